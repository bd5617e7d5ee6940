"""Nothing in a job's folder is removed or overwritten unless penstock made it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from penstock.engine.run.jobs import describe, list_jobs, remove_job
from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import Journal
from penstock.engine.store.lock import JobLock, is_locked
from penstock.engine.store.names import JOB_FILES, LOCK_FILE, RESERVE_FILE
from penstock.errors import JobLocked, JournalError
from tests.faults.life import FINGERPRINT, PLAN, REQUEST, RESERVE_BYTES, live, start
from tests.faults.storage import InterceptedOps

NAMES = (
    "picture", "latents.safetensors", "conditioning.safetensors", "state-1.safetensors",
    "tile-1x2-7.safetensors", "reserve", "lock", "job-0.json", "job-1.json",
    "state-0.safetensors.new", "notes.txt",
)  # fmt: skip


def begun(folder: Path, picture: bytes | None = b"a picture") -> Path:
    """A job that was stopped after a step; its record knows its picture."""
    request = dict(REQUEST)
    if picture is not None:
        sha = hashlib.sha256(picture).hexdigest()
        request["image"] = {"bytes": len(picture), "sha256": sha}
    with Journal.create(
        folder, request, PLAN, FINGERPRINT, picture=picture, reserve_bytes=RESERVE_BYTES
    ) as journal:
        for name in live(journal):
            if name == "step 2":
                break
        journal.mark("stopped")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_not_begun_among_somebodys_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"my {name}")
    with pytest.raises(JournalError, match="no job's") as caught:
        Journal.create(tmp_path, REQUEST, PLAN, FINGERPRINT, reserve_bytes=RESERVE_BYTES)
    assert name in str(caught.value)
    assert contents(tmp_path) == {name: f"my {name}".encode()}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_somebodys_files_is_no_job(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"my {name}")
    with pytest.raises(JournalError, match="holds no job"):
        remove_job(tmp_path)
    assert contents(tmp_path) == {name: f"my {name}".encode()}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in JOB_FILES])
def test_removal_leaves_a_file_put_in_the_place_of_a_jobs_own(tmp_path: Path, name: str) -> None:
    folder = begun(tmp_path / "job")
    (folder / name).write_bytes(b"somebody's own")
    if name == LOCK_FILE:
        with pytest.raises(JournalError, match="not a lock"):
            remove_job(folder)
        assert contents(folder)[name] == b"somebody's own"
        return
    with pytest.raises(JournalError, match="did not make") as caught:
        remove_job(folder)
    assert name in str(caught.value)
    assert contents(folder) == {name: b"somebody's own"}


def test_a_byte_changed_in_a_file_makes_it_somebodys(tmp_path: Path) -> None:
    folder = begun(tmp_path / "job")
    path = folder / "state-1.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(JournalError, match=r"state-1\.safetensors"):
        remove_job(folder)
    assert contents(folder) == {path.name: bytes(changed)}


def test_the_end_of_a_job_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    with start(folder, FileOps()) as journal:
        for name in live(journal):
            if name == "done":
                (folder / "tile-1x2-9.safetensors").write_text("mine")
                (folder / RESERVE_FILE).write_text("mine too")
    assert set(contents(folder)) >= {"tile-1x2-9.safetensors", RESERVE_FILE}
    assert not (folder / "tile-1x2-0.safetensors").exists()


def test_all_of_a_job_goes(tmp_path: Path) -> None:
    folder = begun(tmp_path / "job")
    record = describe(folder).record
    assert record is not None
    (folder / f"state-0.safetensors.{record.job[:12]}.new").write_bytes(b"torn")
    remove_job(folder)
    assert not folder.exists()


class Dies(Exception):
    """As if the process had ended."""


class DyingOps(InterceptedOps):
    """Ends everything at the Nth changing operation."""

    def __init__(self, at: int) -> None:
        self.left, self.passed = at, 0

    def before(self, operation: str, arguments: tuple) -> None:
        if operation in ("names", "size", "free_bytes", "read"):
            return
        self.passed += 1
        if self.passed == self.left:
            raise Dies


def test_a_beginning_that_dies_anywhere_is_listed_and_can_be_freed(tmp_path: Path) -> None:
    """No disk space is taken before a record says so; what there is, `jobs` lists and frees."""
    image, at = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}, 0
    while True:
        at += 1
        root = tmp_path / f"{at}"
        try:
            ops = DyingOps(at)
            Journal.create(
                root / "job", REQUEST | {"image": image}, PLAN, FINGERPRINT,
                picture=b"x", reserve_bytes=RESERVE_BYTES, ops=ops,
            ).close()  # fmt: skip
            break
        except Dies:
            pass
        if not (root / "job").exists():
            continue
        taken = [path for path in (root / "job").iterdir() if path.name != LOCK_FILE]
        if not taken:  # an empty folder: the same one can be begun in again
            start(root / "job", FileOps()).close()
            continue
        (info,) = list_jobs(root)
        assert info.unfinished == (info.record is not None), "what has a record can go on"
        assert info.unfinished == (info.problem is None)
        if info.unfinished:
            Journal.open(root / "job").close()
            assert (root / "job" / "picture").read_bytes() == b"x"
            (info,) = list_jobs(root)
        assert info.size_bytes == sum(path.stat().st_size for path in (root / "job").iterdir())
        remove_job(root / "job")
        assert list_jobs(root) == []
        assert not (root / "job").exists()
    assert at > 15


def test_looking_at_a_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    assert not path.exists()
    lock = JobLock(path)
    assert is_locked(path)
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()
    before = path.stat().st_mtime_ns
    assert not is_locked(path)
    assert path.stat().st_mtime_ns == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no shared look")
def test_a_look_at_the_lock_does_not_make_a_taker_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path = tmp_path / "lock"
    JobLock(path).release()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    waits: list[float] = []

    def look_away(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.close(looking)

    monkeypatch.setattr("penstock.engine.store.lock.time.sleep", look_away)
    JobLock(path).release()
    assert len(waits) == 3


def test_a_lock_whose_file_was_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, its owner removes it: two would else hold two locks."""
    from penstock.engine.store import lock as module

    path = tmp_path / "lock"
    old = JobLock(path)
    opened = module._opened

    def open_then_lose(path: Path) -> int:
        monkeypatch.setattr(module, "_opened", opened)
        descriptor = opened(path)
        old.remove()
        return descriptor

    monkeypatch.setattr(module, "_opened", open_then_lose)
    new = JobLock(path)
    with pytest.raises(JobLocked):
        JobLock(path)
    new.release()


def test_a_job_without_its_picture_is_not_offered(tmp_path: Path) -> None:
    folder = begun(tmp_path / "job")
    assert describe(folder).unfinished
    (folder / "picture").unlink()
    info = describe(folder)
    assert info.state == "stopped"
    assert info.problem is not None and "picture" in info.problem
    assert not info.unfinished


def test_tensors_of_another_job_are_somebodys(tmp_path: Path) -> None:
    one, other = begun(tmp_path / "a", None), begun(tmp_path / "b", None)
    (one / "latents.safetensors").write_bytes((other / "state-0.safetensors").read_bytes())
    with pytest.raises(JournalError, match=r"latents\.safetensors"):
        remove_job(one)
    assert set(contents(one)) == {"latents.safetensors"}
