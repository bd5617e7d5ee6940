"""One worker a job, and a dead one does not count."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from penstock.engine.store.lock import JobLock
from penstock.errors import JobLocked, StorageError

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_a_second_lock_is_refused_and_names_the_owner(tmp_path: Path) -> None:
    lock = JobLock(tmp_path / "lock")
    with pytest.raises(JobLocked, match=rf"process {os.getpid()}\b"):
        JobLock(tmp_path / "lock")
    lock.release()
    lock.release()
    JobLock(tmp_path / "lock").release()


@forks
def test_a_living_process_keeps_it_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        JobLock(tmp_path / "lock")
        os.write(told, b"x")
        signal.pause()
        os._exit(1)
    os.read(ready, 1)
    try:
        with pytest.raises(JobLocked, match=f"process {pid}"):
            JobLock(tmp_path / "lock")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (tmp_path / "lock").read_text() == f"{pid}\n"
    JobLock(tmp_path / "lock").release()


def test_a_recycled_process_id_in_the_file_does_not_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getppid()}\n")
    JobLock(tmp_path / "lock").release()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX links")
def test_the_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="cannot be opened"):
        JobLock(tmp_path / "lock")
    assert (tmp_path / "victim").read_text() == "precious"
