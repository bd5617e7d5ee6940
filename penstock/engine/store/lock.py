"""One worker a job: an advisory lock on a file in the job's directory.

The operating system holds the lock and drops it with the process, however that ends: a lock left by
a dead process is free. The owner's process id in the file is for people only.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from penstock.errors import JobLocked, StorageError

_PID_BYTES = 32
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class JobLock:
    """Held from construction to :meth:`release`.

    Args:
        path: the lock's file; made if absent, never removed (removing it would race).

    Raises:
        JobLocked: another process, or another job of this one, holds it; names the process id.
        StorageError: the file cannot be made, or the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{path} cannot be opened", found=error.strerror) from error
        try:
            _lock(self._descriptor)
        except OSError as error:
            owner = os.pread(self._descriptor, _PID_BYTES, 0) if hasattr(os, "pread") else b""
            os.close(self._descriptor)
            raise _refusal(path, error, owner.decode("ascii", "replace").strip()) from error
        self._held = True
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others work on the job. May be called twice."""
        if self._held:
            self._held = False
            os.close(self._descriptor)


def _refusal(path: Path, error: OSError, owner: str) -> JobLocked | StorageError:
    if error.errno in _HELD:
        return JobLocked(
            f"another process is working on {path.parent}",
            expected="a job that nobody works on",
            found=f"process {owner or 'unknown'}",
            remedy="Wait for it, or stop it; what it has done so far is kept.",
        )
    return StorageError(
        f"{path} cannot be locked",
        found=error.strerror,
        remedy="Keep the job on a local disk: pass --job with a folder there.",
    )


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        # Windows locks are mandatory: a byte far behind the process id stays readable around it.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
