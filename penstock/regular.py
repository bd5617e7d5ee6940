"""Files that are opened to be read: regular ones only, and found out before they are opened.

Opening a named pipe waits for a writer without end, and a device may do anything.
"""

from __future__ import annotations

import errno
import os
import stat
from io import DEFAULT_BUFFER_SIZE, BufferedReader, FileIO
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
)


def check_regular(path: Path) -> None:
    """Refuse what is no file of data.

    Raises:
        OSError: ``path`` cannot be looked at, or is a folder, a pipe, a socket or a device.
    """
    _check(path, path.stat().st_mode)


def open_regular(path: Path, buffer_bytes: int = DEFAULT_BUFFER_SIZE) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: the file.
        buffer_bytes: that are read at once.

    Raises:
        OSError: as `check_regular`, or it cannot be opened.
    """
    return BufferedReader(open_unbuffered(path), buffer_bytes)


def open_unbuffered(path: Path) -> FileIO:
    """As `open_regular`, each read one of the system's.

    Raises:
        OSError: as `open_regular`.
    """
    check_regular(path)
    file = path.open("rb", buffering=0)
    try:
        _check(path, os.fstat(file.fileno()).st_mode)  # it may be another one by now
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path) -> bytes:
    """Read the content of a regular file.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def _check(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    kind = next((name for holds, name in _KINDS if holds(mode)), "no file")
    raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))
