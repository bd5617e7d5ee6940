"""Listing, finding and removing jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from penstock.engine.run.jobs import (
    find_job,
    find_unfinished,
    list_jobs,
    remove_job,
)
from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import JOB_FILES, Journal, read_record
from penstock.errors import JobLocked, JournalError
from tests.faults.life import FINGERPRINT, PLAN, REQUEST, STEPS, live, start
from tests.faults.paths import unprivileged


def partial(folder: Path, stop_after: str, state: str | None = None) -> Path:
    """A job that has come as far as ``stop_after``."""
    with start(folder, FileOps()) as journal:
        for name in live(journal):
            if name == stop_after:
                break
        if state is not None:
            journal.mark(state)
    return folder


def test_jobs_are_listed_with_state_step_age_and_size(tmp_path: Path) -> None:
    partial(tmp_path / "a", "conditioning", "stopped")
    partial(tmp_path / "b", "step 2")
    partial(tmp_path / "c", "latents", "failed")
    partial(tmp_path / "d", "discard")
    with start(tmp_path / "e", FileOps()):
        found = {info.name: info for info in list_jobs(tmp_path)}
    states = {name: (info.state, info.step, info.steps) for name, info in found.items()}
    assert states == {
        "a": ("stopped", 0, STEPS),
        "b": ("killed", 2, STEPS),
        "c": ("failed", STEPS, STEPS),
        "d": ("done", STEPS, STEPS),
        "e": ("running", 0, STEPS),
    }
    assert [info.name for info in list_jobs(tmp_path)] == list("edcba")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "d").iterdir()}
    assert found["d"].size_bytes == sum(sizes.values())
    assert {name for name, info in found.items() if info.unfinished} == {"a", "b", "c"}


def test_a_damaged_job_is_listed_as_such(tmp_path: Path) -> None:
    folder = partial(tmp_path / "a", "step 1")
    (folder / JOB_FILES[0]).write_bytes(b"x")
    (info,) = list_jobs(tmp_path)
    assert info.state == "damaged" and info.problem is not None and "job-0.json" in info.problem
    remove_job(folder)
    assert list_jobs(tmp_path) == []


def test_other_folders_are_no_jobs(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    assert list_jobs(tmp_path) == [] and list_jobs(tmp_path / "nowhere") == []
    with pytest.raises(JournalError, match="holds no job"):
        Journal.open(tmp_path / "holiday")
    with pytest.raises(JournalError, match="holds no job"):
        remove_job(tmp_path / "holiday")
    assert list((tmp_path / "holiday").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_folder_that_cannot_be_read_stands_in_nobodys_way(tmp_path: Path) -> None:
    partial(tmp_path / "mine", "step 1", "stopped")
    locked = partial(tmp_path / "theirs", "step 1", "stopped")
    locked.chmod(0)
    with unprivileged():
        found = {info.name: (info.state, info.problem) for info in list_jobs(tmp_path)}
        offered = find_unfinished(REQUEST, root=tmp_path)
    locked.chmod(0o700)
    assert found == {"mine": ("stopped", None), "theirs": ("unreadable", "Permission denied")}
    assert offered is not None and offered.name == "mine"


def test_the_unfinished_identical_job_is_found(tmp_path: Path) -> None:
    partial(tmp_path / "done", "discard")
    assert find_unfinished(REQUEST, root=tmp_path) is None
    partial(tmp_path / "cut", "step 1")
    found = find_unfinished(REQUEST, root=tmp_path)
    assert found is not None and found.name == "cut"
    assert find_unfinished(REQUEST | {"seed": None}, root=tmp_path) == found
    assert find_unfinished(REQUEST | {"seed": 8}, root=tmp_path) is None
    assert find_unfinished(REQUEST | {"prompt": "a dog"}, root=tmp_path) is None
    assert find_unfinished(REQUEST, tmp_path / "cut") == found
    assert find_unfinished(REQUEST, tmp_path / "done") is None
    assert find_unfinished(REQUEST, tmp_path / "nothing") is None


def test_a_job_is_found_by_folder_name_beginning_or_alone(tmp_path: Path) -> None:
    folder = partial(tmp_path / "20250101-aa", "step 1")
    assert find_job(str(folder), tmp_path / "nowhere") == folder
    assert find_job("20250101-aa", tmp_path) == folder
    assert find_job("2025", tmp_path) == folder
    assert find_job(None, tmp_path) == folder
    partial(tmp_path / "20250102-bb", "step 1")
    for name in (None, "2025", "x"):
        with pytest.raises(JournalError, match="expected exactly one"):
            find_job(name, tmp_path)


def test_removal_takes_a_job_and_nothing_else(tmp_path: Path) -> None:
    folder = partial(tmp_path / "a", "tile 1")
    remove_job(folder)
    assert not folder.exists()
    folder = partial(tmp_path / "b", "tile 1")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(JournalError, match=r"notes\.txt"):
        remove_job(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_job_at_work_is_not_removed(tmp_path: Path) -> None:
    with start(tmp_path / "a", FileOps()) as journal:
        with pytest.raises(JobLocked):
            remove_job(journal.folder)
        journal.save_step(0, {"x": torch.zeros(1)}, {})


def test_a_job_is_not_begun_over_another(tmp_path: Path) -> None:
    folder = partial(tmp_path / "a", "step 1")
    with pytest.raises(JournalError, match="holds a job already"):
        Journal.create(folder, REQUEST, PLAN, FINGERPRINT)
    assert read_record(folder).request == REQUEST


def test_marking_keeps_facts_and_replaces_the_plan(tmp_path: Path) -> None:
    with start(tmp_path / "a", FileOps()) as journal:
        journal.mark("running", output="a.mp4", error="x")
        journal.mark("failed", plan={"chunk": 32}, error=None)
    record = read_record(tmp_path / "a")
    assert (record.state, record.plan, record.facts) == (
        "failed", {"chunk": 32}, {"output": "a.mp4"}
    )  # fmt: skip
