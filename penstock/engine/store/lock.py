"""One worker a job: an advisory lock on a file in the job's directory.

The operating system holds the lock and drops it with the process, however that ends: a lock left by
a dead process is free. The owner's process id in the file is for people only.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from pathlib import Path

from penstock.errors import JobLocked, StorageError

_PID_BYTES = 32
_CONTENT = re.compile(rb"\d{0,20}\n?")
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_TRIES, _PAUSE_S = 200, 0.005
"""Looking at a lock takes it for a moment, shared: whoever wants it tries again."""


class JobLock:
    """Held from construction to :meth:`release`.

    Args:
        path: the lock's file; made if absent.

    Raises:
        JobLocked: another process, or another job of this one, holds it; names the process id.
        StorageError: the file cannot be made, or the file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _taken(path)
        self._held = True
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others work on the job. May be called twice."""
        if self._held:
            self._held = False
            os.close(self._descriptor)

    def remove(self) -> None:
        """Let go of the lock and of its file: who waits for it finds out, and makes a new one.

        Raises:
            OSError: the file cannot be removed.
        """
        if sys.platform == "win32":  # which removes no file that is open
            self.release()
        try:
            self._path.unlink(missing_ok=True)
        finally:
            self.release()


def is_lock(path: Path) -> bool:
    """Return whether ``path`` is the file of a lock: empty, or with a process id in it."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return False
    try:
        return _is_lock(descriptor)
    finally:
        os.close(descriptor)


def _is_lock(descriptor: int) -> bool:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    content = os.read(descriptor, _PID_BYTES)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return _CONTENT.fullmatch(content) is not None


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the lock; leaves no trace, and is in nobody's way.

    Raises:
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return False
    try:
        _lock(descriptor, shared=True)
    except OSError as error:
        if error.errno in _HELD:
            return True
        raise
    finally:
        os.close(descriptor)
    return False


def _taken(path: Path) -> int:
    """Return an open descriptor of ``path`` that holds its lock; the file is still the one of that
    name.

    Raises:
        JobLocked, StorageError: as `JobLock`.
    """
    for _ in range(_TRIES):
        descriptor = _opened(path)
        try:
            _lock(descriptor)
        except OSError as error:
            owner = os.pread(descriptor, _PID_BYTES, 0) if hasattr(os, "pread") else b""
            os.close(descriptor)
            if error.errno in _HELD and not is_locked(path):
                time.sleep(_PAUSE_S)  # somebody only looks, or is just gone
                continue
            raise _refusal(path, error, owner.decode("ascii", "replace").strip()) from error
        # Locking a file that was unlinked meanwhile locks nothing that others would meet.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its owner has removed it: the next one there is another file
    raise _refusal(path, OSError(_HELD[1], ""), "")


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise StorageError(f"{path} cannot be opened", found=error.strerror) from error
    if _is_lock(descriptor):
        return descriptor
    os.close(descriptor)
    raise StorageError(
        f"{path} is not a lock of penstock",
        expected="an empty file, or a process id in it",
        found="another file of that name",
        remedy="Move it away.",
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _refusal(path: Path, error: OSError, owner: str) -> JobLocked | StorageError:
    if error.errno in _HELD:
        return JobLocked(
            f"another process is working on {path.parent}",
            expected="a job that no process is working on",
            found=f"process {owner or 'unknown'}",
            remedy="Wait for it, or stop it; what it has done so far is kept.",
        )
    return StorageError(
        f"{path} cannot be locked",
        found=error.strerror,
        remedy="Keep the job on a local disk: pass --job with a folder there.",
    )


def _lock(descriptor: int, *, shared: bool = False) -> None:
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

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
