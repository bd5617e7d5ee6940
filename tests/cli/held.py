"""The command in a process of its own, held after a step until its answer to a signal is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

CHILD = """
import sys
from penstock.engine.run.sampling import Sampling
step, last = Sampling.step, int(sys.argv.pop(1))
def held(sampling, *arguments):
    if sampling.steps_done == last:
        print("held", file=sys.stderr, flush=True)
        sys.stdin.read(1)
    return step(sampling, *arguments)
Sampling.step = held
from penstock.cli.main import main
main()
"""


def signal_at_step(arguments: Sequence[str], step: int, number: signal.Signals) -> tuple[int, str]:
    """Signal the command in the middle of the step after ``step``, which ends after the answer.

    Returns:
        Its exit code, and stderr.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(step), *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )
    with child:
        assert child.stdin is not None and child.stderr is not None
        seen = _until(child.stderr, "held")
        child.send_signal(number)
        if number != signal.SIGKILL:
            seen += _until(child.stderr, "note: stopping")
            child.stdin.write(".")
            child.stdin.flush()
        seen += child.stderr.read()
    return child.returncode, seen


def _until(lines: IO[str], start: str) -> str:
    seen = ""
    for line in lines:
        seen += line
        if line.startswith(start):
            break
    return seen
