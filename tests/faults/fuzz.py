"""Run cases of the corpus in this process, one line of JSON before and one after each.

``python -m tests.faults.fuzz BASE FOLDER FIRST LAST``. It has 1 GiB of address space more than
after its imports, and 5 s of its own computing time a case: more ends it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.engine import Engine
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.media.picture import measure, open_image
from penstock.errors import PenstockError
from tests.engine.running import a_request
from tests.faults.corpus import Case, make

ROOM_BYTES = 1 << 30
CASE_S = 5.0


def main(base: Path, folder: Path, first: int, last: int) -> None:
    """Cases ``first`` to ``last``, exclusive. An error of a call that is none of ours ends it."""
    _warm(base, folder)
    _limit()
    for number in range(first, last):
        home = folder / f"{number}"
        case = make(number, base, home)
        print(json.dumps({"begun": number, "area": case.area}), flush=True)
        before = _files(folder)
        signal.setitimer(signal.ITIMER_PROF, CASE_S)
        outcome = _run(case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _files(folder) != before:
            outcome = f"wrong: files left: {sorted(_files(folder) ^ before)[:3]}"
        print(json.dumps({"done": number, "area": case.area, "outcome": outcome}), flush=True)
        shutil.rmtree(home)


def _warm(base: Path, folder: Path) -> None:
    """Load all libraries, so that cases are measured and not imports."""
    picture = folder / "warm.png"
    from PIL import Image

    Image.new("RGB", (16, 16)).save(picture)
    with Engine.open(base, device="cpu", vram="200MiB", ram="200MiB") as engine:
        engine.submit(a_request(image=picture, steps=1)).result()
    CliRunner().invoke(app, ["inspect", str(base)])
    unknown = folder / "unknown"
    unknown.mkdir()
    (unknown / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    CliRunner().invoke(app, ["plan", "--model", str(unknown)])  # as diffusers is asked for its own


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def _run(case: Case) -> str:
    if case.kind == "cli":
        return _command(case.arguments)
    path = Path(case.arguments[0])
    try:
        if case.kind == "tokenise":
            Tokenizer(path).tokenise(["a prompt"])
        elif case.kind == "picture":
            measure(path)
            open_image(path)
        else:
            _job(path)
    except PenstockError as error:
        return "refused" if "\n" not in str(error) else f"wrong: {error}"
    return "accepted"


def _job(model: Path) -> None:
    with Engine.open(model, device="cpu", vram="200MiB", ram="200MiB") as engine:
        engine.submit(a_request(image=model.parents[1] / "warm.png", steps=2)).result()


def _command(arguments: tuple[str, ...]) -> str:
    run = CliRunner().invoke(app, list(arguments))
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        text = "".join(traceback.format_exception(run.exception))
        return "wrong: " + text[-1500:]
    if run.exit_code == 0:
        return "accepted"
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    one = sum(line.startswith("error: ") for line in lines) == 1 and lines[-1].startswith("error: ")
    # That nothing fits is an answer of `plan`, which lays out what takes how much.
    answered = (
        (arguments[0], run.exit_code) == ("plan", 1)
        and lines
        and re.fullmatch(r"plan for .+: no plan fits the (RAM|VRAM) budget", lines[0])
        and any(line.startswith("What fits: ") for line in lines)
    )
    if run.exit_code in (1, 2) and (one or answered) and "Traceback" not in run.output:
        return "refused"
    return f"wrong: exit code {run.exit_code}: {run.output[-500:]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
