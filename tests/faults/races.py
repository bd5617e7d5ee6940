"""Processes that want the same thing at the same moment: a name, a job's folder, a pack."""

from __future__ import annotations

import os
import secrets
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from penstock.engine.packs.cache import cached_packs, remove_pack
from penstock.engine.packs.file import verify
from penstock.engine.packs.firstuse import FirstUse
from penstock.engine.packs.plan import ComponentPlan
from penstock.engine.run.jobs import list_jobs, remove_job
from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import Journal, read_record
from penstock.errors import JobLocked, JournalError, StorageError, UsageError

CRASHED = 99


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
                if code == CRASHED:
                    traceback.print_exc()
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
        place.mkdir(parents=True)
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


def one_folder(folder: Path, races: int) -> tuple[int, int]:
    """Let two processes begin a job in the same folder, while a third lists and a fourth removes
    what is done; gives how many races there were and how many jobs were lost: begun and not there,
    or there twice."""
    lost = 0
    for number in range(races):
        place = folder / f"{number}"
        codes = together(
            partial(_begun, place / "job", "one"),
            partial(_begun, place / "job", "two"),
            partial(_listed, place),
            partial(_listed, place),
        )
        record = read_record(place / "job")
        begun = [name for name, code in zip(("one", "two"), codes, strict=False) if code == 0]
        assert sorted(codes) == [0, 0, 0, 1], f"one begins, the other is refused: {codes}"
        with Journal.open(place / "job") as journal:
            state = journal.load_latest()
        lost += begun != [record.request["prompt"]] or state is None or state.step != 1
    return races, lost


def _begun(folder: Path, prompt: str) -> int:
    try:
        with Journal.create(folder, {"prompt": prompt, "steps": 1}, {}, {}) as journal:
            journal.save_step(1, {"x": torch.ones(2)}, {})
            time.sleep(0.01)  # the other one comes while this one is at work
            journal.mark("stopped")
    except JournalError:
        return 1
    return 0


def _listed(root: Path) -> int:
    for _ in range(20):
        for info in list_jobs(root):
            assert info.state in ("running", "stopped", "killed", "damaged"), info
    return 0


def removed_and_begun(folder: Path, races: int) -> tuple[int, int]:
    """Let one process remove a job while two others begin one in its folder; gives how many races
    there were and how many jobs were lost."""
    lost = 0
    for number in range(races):
        place = folder / f"{number}"
        assert _begun(place / "job", "old") == 0
        codes = together(
            partial(_removed, place / "job"),
            partial(_begun, place / "job", "one"),
            partial(_begun, place / "job", "two"),
        )
        begun = [name for name, code in zip(("one", "two"), codes[1:], strict=True) if code == 0]
        there = [info.record.request["prompt"] for info in list_jobs(place) if info.record]
        assert len(begun) <= 1
        lost += there != (begun or ([] if codes[0] == 0 else ["old"]))
    return races, lost


def _removed(folder: Path) -> int:
    try:
        remove_job(folder)
    except JournalError:
        return 1
    return 0


def one_cache(plan: ComponentPlan, folder: Path, races: int) -> tuple[int, int]:
    """Let two processes make the same pack in a cache, while a third lists it and a fourth removes
    what it finds; gives how many races there were and how many packs were lost or not whole."""
    lost = 0
    for number in range(races):
        cache = folder / f"{number}"
        use = FirstUse("int8", plan, cache / f"wan-int8-{'0' * 16}")
        codes = together(
            partial(_made, use),
            partial(_made, use),
            partial(_looked, cache),
            partial(_cleared, cache),
        )
        assert codes[2] == codes[3] == 0, codes
        whole = use.origin is not None and not verify(use.folder / plan.file).damage
        gone = not (use.folder / plan.file).exists()
        lost += not (whole or gone) or any(code not in (0, 1) for code in codes[:2])
        if gone:
            assert _made(use) == 0, "it can be made again"
    return races, lost


def _made(use: FirstUse) -> int:
    try:
        use.make(64 << 20, lambda done: None, lambda held: None)
    except StorageError:
        return 1  # it was removed under it: a job says so, and makes it again
    return 0


def _looked(cache: Path) -> int:
    for _ in range(50):
        cached_packs(cache)
    return 0


def _cleared(cache: Path) -> int:
    for pack in cached_packs(cache):
        with suppress(JobLocked, UsageError):
            remove_pack(cache, pack.name)
    return 0
