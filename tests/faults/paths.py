"""What can be wrong with a path: each fault makes one, for whichever option it goes to."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Fault = Callable[[Path, str, pytest.MonkeyPatch, ExitStack], Path]
"""Given a folder, the ending that names have there, and what undoes things: the path."""

_CAP_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


@contextmanager
def unprivileged() -> Iterator[None]:
    """This thread without root's right to pass over permissions (capabilities(7))."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(_CAP_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] = effective & ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0


def _missing(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    return place / "nowhere" / f"x{end}"


def _too_long(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    return place / f"{'x' * 300}{end}"


def _locked(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    path = place / f"locked{end}"
    path.write_bytes(b"content")
    path.chmod(0)
    undo.enter_context(unprivileged())
    return path


def _in_a_locked_folder(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    folder = place / "locked"
    folder.mkdir()
    (folder / f"x{end}").write_bytes(b"content")
    folder.chmod(0)
    undo.callback(folder.chmod, 0o700)
    undo.enter_context(unprivileged())
    return folder / f"x{end}"


def _loop(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    path = place / f"loop{end}"
    path.symlink_to(path)
    return path


def _under_a_file(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    (place / "file").write_bytes(b"content")
    return place / "file" / f"x{end}"


def _pipe(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    path = place / f"pipe{end}"
    os.mkfifo(path)
    return path


def _device(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    path = place / f"device{end}"
    path.symlink_to("/dev/zero")
    return path


def _socket(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    patch.chdir(place)  # a socket's path must be short
    undo.enter_context(socket.socket(socket.AF_UNIX)).bind(f"socket{end}")
    return place / f"socket{end}"


def _failing(code: int) -> Fault:
    def fault(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
        path = place / f"failing{end}"
        path.write_bytes(b"content")

        def fails(function: Callable[..., object]) -> Callable[..., object]:
            def call(name: object = ".", *rest: object, **how: object) -> object:
                if isinstance(name, str | os.PathLike) and str(name).startswith(str(path)):
                    raise OSError(code, os.strerror(code), str(name))
                return function(name, *rest, **how)

            return call

        for module, name in (
            (os, "stat"), (os, "lstat"), (os, "open"), (io, "open"), (os, "listdir"),
            (os, "scandir"), (os, "mkdir"), (os, "link"),
        ):  # fmt: skip
            patch.setattr(module, name, fails(getattr(module, name)))
        return path

    return fault


def _other_bytes(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    return place / os.fsdecode(b"caf\xe9") / f"x{end}"


def _control_characters(place: Path, end: str, patch: pytest.MonkeyPatch, undo: ExitStack) -> Path:
    return place / "a\x1b[2J\nerror: none [bold]x[/bold]" / f"x{end}"


FAULTS: dict[str, Fault] = {
    "missing": _missing,
    "too long": _too_long,
    "locked": _locked,
    "in a locked folder": _in_a_locked_folder,
    "loop": _loop,
    "under a file": _under_a_file,
    "pipe": _pipe,
    "device": _device,
    "socket": _socket,
    "stale": _failing(errno.ESTALE),
    "failing": _failing(errno.EIO),
    "other bytes": _other_bytes,
    "control characters": _control_characters,
}


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Names below a folder, with mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mode, content)
    return found
