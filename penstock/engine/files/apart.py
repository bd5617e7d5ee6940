"""Work on a file that a library's native code reads, in a process of its own.

Such code can crash, hang or take all memory over a damaged file, and nothing inside a process stops
it. Here only the child ends, and the caller gets one line that names the file.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from penstock.errors import CheckpointError
from penstock.units import GIB, format_bytes

_ROOT = str(Path(__file__).resolve().parents[3])
# Isolated (-I), so that no file of the current folder is imported; the caller's path is told
_START = (
    "import sys; sys.path[:0] = sys.argv[1:]; "
    "from penstock.engine.files.apart import serve; serve(sys.stdin.buffer, sys.stdout)"
)
# One thread and one heap: address space is what is limited, and each more takes tens of MiB of it
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
_GRACE_S = 5
_SHOWN = 200


@dataclass(frozen=True)
class ChildLimits:
    """What the child may take.

    Attributes:
        seconds: from its start to its answer.
        memory_bytes: of address space; where the system cannot limit it (Windows), it is not.
    """

    seconds: float = 120.0
    memory_bytes: int = 2 * GIB


def call_apart(function: str, request: dict[str, Any], where: str, limits: ChildLimits) -> Any:
    """Return what ``function`` returns for ``request``, called in a process of its own.

    Args:
        function: ``"module:name"``; imported in the child alone, best without torch.
        request: its keyword arguments, JSON-ready; so must the result be.
        where: the file that is worked on, for the error.
        limits: of the child.

    Raises:
        CheckpointError: the child raised, crashed, took too long or too much memory.
    """
    text = json.dumps(
        {"function": function, "arguments": request, "memory_bytes": limits.memory_bytes,
         "alarm_s": int(limits.seconds) + _GRACE_S}
    )  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _START, *_search_path()],
            input=text.encode(),
            capture_output=True,
            timeout=limits.seconds,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _unusable(where, f"no answer in {limits.seconds:g} s", limits) from error
    except OSError as error:
        raise _unusable(where, f"a process that does not start ({error})", limits) from error
    if done.returncode:
        raise _unusable(where, _last_words(done.returncode, done.stderr), limits)
    return json.loads(done.stdout)


def serve(incoming: Any, outgoing: Any) -> None:
    """Be the child: set its limits, do what is asked, answer. Errors end it; the caller reads
    them."""
    asked = json.loads(incoming.read())
    _limit(asked["memory_bytes"], asked["alarm_s"])
    module, _, name = asked["function"].partition(":")
    json.dump(getattr(import_module(module), name)(**asked["arguments"]), outgoing)


def _limit(memory_bytes: int, alarm_s: int) -> None:
    """Also without a parent that watches, the child ends; and it leaves no core file."""
    if sys.platform == "win32":
        return
    import resource

    for kind, wanted in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (most, hard))
    signal.alarm(alarm_s)


def _search_path() -> list[str]:
    paths = (str(Path(entry).resolve()) for entry in sys.path if entry)
    return list(dict.fromkeys([_ROOT, *paths]))


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, **_ENVIRONMENT}


def _last_words(code: int, stderr: bytes) -> str:
    """Return how the child ended: its last line, and the signal if one ended it."""
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    said = lines[-1].strip()[:_SHOWN] if lines else ""
    if code > 0:
        return said or f"exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"{name}: {said}" if said else name


def _unusable(where: str, found: str, limits: ChildLimits) -> CheckpointError:
    return CheckpointError(
        f"{where} cannot be used",
        expected=f"a file that is read within {limits.seconds:g} s "
        f"and {format_bytes(limits.memory_bytes)}",
        found=found,
        remedy="It is damaged, or was made to do harm: download it again from its source",
    )
