"""Files of weights: opened once, read at positions, and found out when they change under us.

Nothing is mapped into memory: a mapped file that shrinks kills the process, a short read does not.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from penstock.blocks import PAGE_BYTES
from penstock.closing import Closing
from penstock.errors import CheckpointChanged, CheckpointError
from penstock.regular import open_unbuffered

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class FileStamp:
    """What tells a file from a changed one: size, time of the last change, identity."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def check_stamp(path: Path, status: os.stat_result, stamp: FileStamp) -> None:
    """Raise CheckpointChanged unless ``status`` of ``path`` still carries ``stamp``."""
    found = FileStamp.of(status)
    if found != stamp:
        raise changed(
            path, f"{stamp.size:,} bytes, as when it was opened", _difference(found, stamp)
        )


def changed(path: Path, expected: str, found: str) -> CheckpointChanged:
    """Return the error for a file that is no longer what it was when it was opened."""
    return CheckpointChanged(
        f"{path} changed while it was in use",
        expected=expected,
        found=found,
        remedy="Let downloads and copies finish, check the file, and start again.",
    )


def _difference(found: FileStamp, stamp: FileStamp) -> str:
    if found.size != stamp.size:
        return f"{found.size:,} bytes"
    if found.inode != stamp.inode:
        return "another file in its place"
    return "a newer time of change"


class WeightFile(Closing):
    """An open file that is read at positions, from any number of threads at once.

    Args:
        path: the file.
        stamp: what it must still be; None takes what it is now.
        direct: read around the page cache where platform, file system and alignment allow.

    Attributes:
        direct: whether direct reads work here (False from the first refusal on).

    Raises:
        CheckpointError: it cannot be opened.
        CheckpointChanged: it no longer carries ``stamp``.
    """

    def __init__(self, path: Path, stamp: FileStamp | None = None, *, direct: bool = False) -> None:
        self.path = path
        try:
            self._file = open_unbuffered(path)
        except OSError as error:
            raise unreadable(path, error) from error
        self._direct_fd: int | None = None
        self._seek_lock = threading.Lock()
        try:
            status = os.fstat(self._file.fileno())
            self.stamp = FileStamp.of(status) if stamp is None else stamp
            check_stamp(path, status, self.stamp)
            self.direct = direct and self._open_direct()
        except CheckpointError:
            self.close()
            raise

    def _open_direct(self) -> bool:
        if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
            return False
        try:
            self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                return False
            raise unreadable(self.path, error) from error
        # The path was looked up a second time: it must have led to the same file.
        check_stamp(self.path, os.fstat(self._direct_fd), self.stamp)
        return True

    def read_into(self, target: memoryview, offset: int, *, on_page: bool = False) -> int:
        """Fill ``target`` from ``offset`` on: directly if both begin on a page.

        Args:
            on_page: whether the memory of ``target`` begins on a page.

        Returns:
            How many of the bytes were read directly.

        Raises:
            CheckpointChanged: the file ends too early.
            CheckpointError: the disk reports an error.
        """
        aligned = on_page and offset % PAGE_BYTES == 0
        direct = self._read_direct(target, offset) if self.direct and aligned else 0
        done = direct
        while done < len(target):
            count = self._read_some(target[done:], offset + done)
            if count == 0:
                raise changed(
                    self.path, f"{offset + len(target):,} bytes or more", f"{offset + done:,}"
                )
            done += count
        # What went through the page cache is dropped: weights are read once a pass in a cycle
        # longer than the cache, which would only push out what others use.
        self._drop_cache(offset + direct, done - direct)
        return direct

    def _read_direct(self, target: memoryview, offset: int) -> int:
        """Return whole pages of ``target``, as many as come; the caller reads what is left."""
        assert self._direct_fd is not None
        # O_DIRECT wants offset, memory and length in whole blocks; the tail goes through the cache.
        whole = len(target) - len(target) % PAGE_BYTES
        done = 0
        # A short read may end off a page; from there on nothing is aligned any more.
        while done < whole and done % PAGE_BYTES == 0:
            try:
                count = os.preadv(self._direct_fd, [target[done:whole]], offset + done)
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise unreadable(self.path, error) from error
                self.direct = False
                break
            if count == 0:
                break
            done += count
        return done

    def _read_some(self, target: memoryview, offset: int) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._file.fileno(), [target], offset)
            with self._seek_lock:  # Windows has no positional reads: seek and read as one step.
                self._file.seek(offset)
                return self._file.readinto(target) or 0
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _drop_cache(self, offset: int, nbytes: int) -> None:
        if nbytes and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise CheckpointChanged if the open file was truncated, extended or written to."""
        check_stamp(self.path, os.fstat(self._file.fileno()), self.stamp)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
        descriptor, self._direct_fd = self._direct_fd, None
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def looked_at(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a CheckpointError that names the file, or ``path``."""
    try:
        yield
    except OSError as error:
        named = error.filename
        raise unreadable(path if named is None else Path(os.fsdecode(named)), error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the operating system does not give us."""
    return CheckpointError(
        f"{path} cannot be read",
        found=error.strerror or str(error),
        remedy="Check that the file is there, readable and on a healthy disk.",
    )
