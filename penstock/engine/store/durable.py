"""Files that survive a crash: every operation behind one object, and the atomic write made of it.

The order is the one that POSIX guarantees something for: a new file, its content, fsync, rename
over the old name, fsync of the directory. A file whose fsync failed is abandoned, never synced
again: the kernel may have dropped the pages it could not write, and report success the next time
(P. Rebello and others, "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from penstock.errors import JournalError, StorageError
from penstock.units import format_bytes

NEW_SUFFIX = ".new"
"""Of a file that is being written; one that is found later was abandoned."""

_WRITE_BYTES = 8 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_CANNOT_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class FileOps:
    """The operations a journal is made of. Stateless; tests put failing ones in its place."""

    def create(self, path: Path) -> int:
        """Make a file that did not exist and return its descriptor, open for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return os.open(path, flags, 0o600)

    def append(self, path: Path) -> int:
        """Open a file of :meth:`create` once more, to write at its end."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data`` and return how many bytes it was."""
        return os.write(descriptor, data)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Claim disk space for ``nbytes`` bytes of the file, where the platform can."""
        if nbytes == 0 or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise

    def fsync(self, descriptor: int) -> None:
        """Return when the file's content is on the disk itself."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync alone stops at the drive's cache
        else:
            os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor of :meth:`create` or :meth:`append`."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``, replacing what had it."""
        source.replace(target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Give ``source`` the name ``target``, which must be free, in one step.

        A second name by a hard link is what POSIX has for it; where a file system has no links, an
        empty file claims the name first.

        Raises:
            FileExistsError: something has the name; both are as they were.
        """
        if sys.platform == "win32":
            source.rename(target)  # refuses a name that is taken
            return
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            os.close(self.create(target))
            source.replace(target)
        else:
            source.unlink()

    def fsync_dir(self, folder: Path) -> None:
        """Return when the folder's entries are on the disk (Windows has no such call)."""
        if sys.platform == "win32":
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, nbytes: int) -> None:
        """Cut a file to ``nbytes``."""
        os.truncate(path, nbytes)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is not there is fine."""
        path.unlink(missing_ok=True)

    def rmdir(self, folder: Path) -> None:
        """Remove an empty folder."""
        folder.rmdir()

    def mkdir(self, folder: Path) -> None:
        """Make a folder and its parents; one that is there is fine."""
        folder.mkdir(parents=True, exist_ok=True)

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(path.name for path in folder.iterdir())

    def size(self, path: Path) -> int:
        """Return the bytes of a file; 0 where there is none."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def free_bytes(self, folder: Path) -> int:
        """Return what the folder's file system has left for this user."""
        return shutil.disk_usage(folder).free

    def read(self, path: Path, limit_bytes: int | None = None) -> bytes:
        """Read the content of a regular file, or its first ``limit_bytes``.

        Raises:
            OSError: as :meth:`open`.
        """
        with self.open(path) as file:
            return file.read() if limit_bytes is None else file.read(limit_bytes)

    def open(self, path: Path) -> BinaryIO:
        """Open a regular file for reading.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read, or is a link, a pipe or a device.
        """
        extra = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, os.O_RDONLY | extra | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")


def write_atomically(
    ops: FileOps, path: Path, chunks: Iterable[bytes | memoryview], tag: str = ""
) -> None:
    """Replace ``path`` by the joined ``chunks``: after a crash it is the old or the new file.

    When this returns, the new file is on the disk. When it raises, the old one still is (or, where
    only the last sync of the directory failed, one of the two).

    Args:
        ops: the file operations.
        path: the file.
        chunks: its content.
        tag: part of the name under which it is written, so that nobody else has that name.

    Raises:
        StorageError: names the path, and what was needed and free where the disk is full.
    """
    new = write_new(ops, path, chunks, tag)
    with storing(ops, path):
        # The content was synced before: a rename may reach the disk before the data it names. The
        # directory is synced after: until then the rename itself may be lost.
        ops.rename(new, path)
        ops.fsync_dir(path.parent)


def write_new(
    ops: FileOps, path: Path, chunks: Iterable[bytes | memoryview], tag: str = ""
) -> Path:
    """Do the first half of `write_atomically`: the content is on the disk, under another name,
    which is returned.

    Raises:
        StorageError: as `write_atomically`.
    """
    parts = [memoryview(chunk).cast("B") for chunk in chunks]
    need_bytes = sum(part.nbytes for part in parts)
    new = new_name(path, tag)
    with storing(ops, path, need_bytes):
        ops.unlink(new)
        _write_file(ops, new, parts, need_bytes)
    return new


def new_name(path: Path, tag: str) -> Path:
    """Return what `write_atomically` calls ``path`` until it is whole."""
    return path.with_name(f"{path.name}{tag and '.'}{tag}{NEW_SUFFIX}")


def _write_file(ops: FileOps, path: Path, parts: list[memoryview], nbytes: int) -> None:
    descriptor = ops.create(path)
    try:
        try:
            # Space first: a disk that is full says so before anything is written.
            ops.allocate(descriptor, nbytes)
            for part in parts:
                _write_all(ops, descriptor, part)
            ops.fsync(descriptor)
        finally:
            ops.close(descriptor)
    except OSError:
        _abandon(ops, path)
        raise


def _write_all(ops: FileOps, descriptor: int, data: memoryview) -> None:
    done = 0
    while done < data.nbytes:
        done += ops.write(descriptor, data[done : done + _WRITE_BYTES])


def _abandon(ops: FileOps, path: Path) -> None:
    try:
        ops.unlink(path)
    except OSError:
        return  # the first error is the one to report; the next write removes the leftover


def remove_if_empty(ops: FileOps, folder: Path) -> None:
    """Remove a folder that nothing is in; what another process has begun there meanwhile stays.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        ops.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def storing(ops: FileOps, path: Path, need_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the body into a StorageError with path, need, free bytes and remedy.

    Args:
        ops: the file operations.
        path: what is written, read or removed.
        need_bytes: what the body takes of the disk.
    """
    try:
        yield
    except OSError as error:
        raise _storage_error(ops, path, need_bytes, error) from error


def _storage_error(ops: FileOps, path: Path, need_bytes: int, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno not in _NO_SPACE:
        return StorageError(
            f"{path} cannot be used",
            found=reason,
            remedy="What was saved before is intact: check the disk, then resume the job.",
        )
    return StorageError(
        f"no space for {path}",
        expected=f"{format_bytes(need_bytes)} ({need_bytes:,} bytes)",
        found=f"{reason}, {_free(ops, path.parent)} free",
        remedy="What was saved before is intact: make space, then resume the job.",
    )


def _free(ops: FileOps, folder: Path) -> str:
    try:
        return format_bytes(ops.free_bytes(folder))
    except OSError as error:
        return f"unknown space ({error.strerror})"


def read_whole(ops: FileOps, path: Path) -> bytes | None:
    """Read the content of ``path``; None where there is no such file.

    Raises:
        JournalError: it is there and cannot be read.
    """
    try:
        return ops.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{path} cannot be read", found=error.strerror or str(error)) from error


class Reserve:
    """Disk space kept for a job's future files: one file of claimed space, given back in pieces.

    Where the platform cannot claim space, only the free space is checked.

    Args:
        ops: the file operations.
        path: of the file that holds the space.
        mark: its first bytes, by which it is known again.
        tag: as `write_atomically` takes it.
    """

    def __init__(self, ops: FileOps, path: Path, mark: bytes, tag: str) -> None:
        self._ops, self._path, self._mark = ops, path, mark
        self._new = new_name(path, tag)

    def claim(self, nbytes: int) -> None:
        """Take ``nbytes`` of the disk.

        Raises:
            StorageError: there is not as much; nothing is taken then.
        """
        with storing(self._ops, self._path, nbytes):
            if self._ops.free_bytes(self._path.parent) < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._allocate(nbytes)

    def _allocate(self, nbytes: int) -> None:
        descriptor = self._ops.create(self._new)
        try:
            try:
                _write_all(self._ops, descriptor, memoryview(self._mark))
                self._ops.allocate(descriptor, nbytes)
                self._ops.fsync(descriptor)
            finally:
                self._ops.close(descriptor)
            # Named when it is whole: under its name it always begins with the mark that tells whose
            # it is.
            self._ops.rename(self._new, self._path)
        except OSError:
            _abandon(self._ops, self._new)
            raise

    def shrink(self, nbytes: int) -> None:
        """Keep no more than ``nbytes``, and the mark.

        Raises:
            StorageError: the file system refuses.
        """
        with storing(self._ops, self._path):
            nbytes = max(nbytes, len(self._mark))
            if self._ops.size(self._path) > nbytes:
                self._ops.truncate(self._path, nbytes)
