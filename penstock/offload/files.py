"""Reading bytes by position, straight into the buffer they are wanted in."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch import Tensor

from penstock.errors import CheckpointChanged

_CHUNK_BYTES = 16 << 20


class FileReader:
    """Open files, read by position; safe to use from several threads.

    What was read is not kept in the system's page cache: the tiers hold what is worth holding.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, buffer: Tensor) -> None:
        """Fill ``buffer`` (uint8, on the CPU, contiguous) from ``offset`` in the file.

        Raises:
            CheckpointChanged: the file is gone, or ends before the buffer is full.
        """
        view = memoryview(buffer.numpy())
        try:
            done = self._read(path, offset, view)
        except OSError as error:
            raise _changed(path, str(error)) from error
        if done < len(view):
            raise _changed(path, f"the file ends after {offset + done:,} bytes")

    def _read(self, path: Path, offset: int, view: memoryview) -> int:
        descriptor = self._descriptor(path)
        done = 0
        while done < len(view):
            part = view[done : done + _CHUNK_BYTES]
            count = self._read_at(descriptor, part, offset + done)
            if count == 0:
                break
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        return done

    def _read_at(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with self._lock:  # Windows: seek and read are two calls
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            return self._files[path]

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()


def _changed(path: Path, found: str) -> CheckpointChanged:
    return CheckpointChanged(
        f"{path} can no longer be read as it was",
        expected="the file that was opened",
        found=found,
        remedy="Put the file back (or copy it again) and start the job again",
    )
