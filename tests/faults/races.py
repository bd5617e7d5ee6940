"""Processes that want the same thing at the same moment: a name, a job's folder, a pack."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from penstock.engine.store.durable import FileOps

LOST, CRASHED = 98, 99


def together(*bodies: Callable[[], int]) -> list[int]:
    """Run each body in a process of its own, all let go at once; gives their exit codes."""
    gate, opened = os.pipe()
    children = []
    for body in bodies:
        pid = os.fork()
        if pid == 0:
            os.close(opened)
            os.read(gate, 1)  # returns when the parent closes its end
            code = CRASHED
            try:
                code = body()
            finally:
                os._exit(code)
        children.append(pid)
    os.close(gate)
    os.close(opened)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def one_name(folder: Path, races: int) -> tuple[int, int]:
    """Let two processes give a finished file the same name; gives how many races there were and
    how many files were lost."""
    lost = 0
    for number in range(races):
        place = folder / f"{number}"
        place.mkdir()
        texts = [secrets.token_hex(8) for _ in range(2)]
        for text in texts:
            (place / f"{text}.part").write_text(text)
        codes = together(*(partial(_named, place, text) for text in texts))
        kept = sorted(path.read_text() for path in place.iterdir())
        assert sorted(codes) == [0, 1], "one has the name, and the other knows"
        lost += kept != sorted(texts)
    return races, lost


def _named(place: Path, text: str) -> int:
    try:
        FileOps().rename_new(place / f"{text}.part", place / "out.mp4")
    except FileExistsError:
        FileOps().rename_new(place / f"{text}.part", place / "out-2.mp4")
        return 1
    return 0
