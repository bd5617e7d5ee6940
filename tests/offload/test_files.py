"""Files read by position: whole, direct where possible, and found out when they change."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import CheckpointChanged, CheckpointError
from penstock.offload import tiers
from penstock.offload.files import FileStamp, WeightFile
from tests.offload.blocks import open_descriptors

CONTENT = os.urandom(3 * 4096 + 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "weights.bin"
    file.write_bytes(CONTENT)
    return file


@contextmanager
def page_buffer(nbytes: int) -> Iterator[memoryview]:
    yield memoryview(tiers._anonymous(nbytes))[:nbytes]


def has_direct(path: Path) -> bool:
    with WeightFile(path, direct=True) as file:
        return file.direct


@pytest.mark.parametrize(("offset", "nbytes"), [(0, len(CONTENT)), (1, 5000), (8192, 4196), (7, 0)])
@pytest.mark.parametrize("direct", [True, False])
def test_reads_what_is_there(path: Path, offset: int, nbytes: int, direct: bool) -> None:
    with WeightFile(path, direct=direct) as file, page_buffer(nbytes + 1) as buffer:
        file.read_into(buffer[:nbytes], offset, on_page=True)
        assert bytes(buffer[:nbytes]) == CONTENT[offset : offset + nbytes]


def test_whole_pages_are_read_directly(path: Path) -> None:
    if not has_direct(path):
        pytest.skip("no direct reads on this file system")
    with WeightFile(path, direct=True) as file, page_buffer(len(CONTENT)) as buffer:
        assert file.read_into(buffer, 0, on_page=True) == 3 * 4096
        assert bytes(buffer) == CONTENT
        assert file.read_into(buffer[:4096], 8, on_page=True) == 0
        assert file.read_into(buffer[:4096], 4096, on_page=False) == 0
        assert file.direct


def test_a_file_system_without_direct_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with WeightFile(path, direct=True) as file, page_buffer(len(CONTENT)) as buffer:
        assert not file.direct
        assert file.read_into(buffer, 0, on_page=True) == 0
        assert bytes(buffer) == CONTENT


def test_direct_reads_refused_at_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    with WeightFile(path, direct=True) as file, page_buffer(len(CONTENT)) as buffer:
        if not file.direct:
            pytest.skip("no direct reads on this file system")

        def refuse(descriptor: int, views: Any, offset: int) -> int:
            if descriptor == file._direct_fd:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, views, offset)

        monkeypatch.setattr(os, "preadv", refuse)
        assert file.read_into(buffer, 0, on_page=True) == 0
        assert bytes(buffer) == CONTENT and not file.direct


def test_a_disk_error_is_not_a_short_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for direct in (True, False):
        with WeightFile(path, direct=direct) as file, page_buffer(8192) as buffer:
            with pytest.raises(
                CheckpointError, match="cannot be read: found Input/output"
            ) as error:
                file.read_into(buffer, 0, on_page=True)
            assert not isinstance(error.value, CheckpointChanged)


def test_reads_that_come_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:1000]], at))
    with WeightFile(path) as file, page_buffer(len(CONTENT)) as buffer:
        file.read_into(buffer, 0)
        assert bytes(buffer) == CONTENT


def test_without_positional_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "O_DIRECT", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    with WeightFile(path, direct=True) as file, page_buffer(len(CONTENT)) as buffer:
        assert not file.direct
        file.read_into(buffer, 0, on_page=True)
        assert bytes(buffer) == CONTENT


@pytest.mark.parametrize("direct", [True, False])
def test_a_short_read_is_a_changed_file(path: Path, direct: bool) -> None:
    with WeightFile(path, direct=direct) as file, page_buffer(len(CONTENT)) as buffer:
        os.truncate(path, 4096 + 50)
        with pytest.raises(CheckpointChanged, match=r"expected 12,388 bytes or more, found 4,146"):
            file.read_into(buffer, 0, on_page=True)


def test_what_changed_is_named(path: Path, tmp_path: Path) -> None:
    stamp = FileStamp.of(path.stat())
    with WeightFile(path, stamp) as file:
        file.check_unchanged()
        os.utime(path, ns=(0, stamp.mtime_ns + 1))
        with pytest.raises(CheckpointChanged, match="a newer time of change"):
            file.check_unchanged()
        os.truncate(path, 10)
        with pytest.raises(CheckpointChanged, match="found 10 bytes"):
            file.check_unchanged()
    other = tmp_path / "other"
    other.write_bytes(CONTENT)
    os.utime(other, ns=(stamp.mtime_ns, stamp.mtime_ns))
    other.replace(path)
    with pytest.raises(CheckpointChanged, match="another file in its place"):
        WeightFile(path, stamp)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        WeightFile(tmp_path / "nothing.safetensors")


def test_a_file_exchanged_between_two_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct(path):
        pytest.skip("no direct reads on this file system")
    real, before = os.open, open_descriptors()

    def exchange(name: Any, *rest: Any, **named: Any) -> int:
        (path.parent / "new").write_bytes(CONTENT)
        (path.parent / "new").replace(path)
        return real(name, *rest, **named)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(CheckpointChanged, match="another file in its place"):
        WeightFile(path, direct=True)
    assert open_descriptors() == before


def test_direct_reads_that_are_not_allowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    if not has_direct(path):
        pytest.skip("no direct reads on this file system")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        WeightFile(path, direct=True)


def test_closing_twice_and_no_descriptor_left(path: Path) -> None:
    before = open_descriptors()
    file = WeightFile(path, direct=True)
    file.close()
    file.close()
    with pytest.raises(CheckpointChanged):
        WeightFile(path, FileStamp(1, 1, 1), direct=True)
    assert open_descriptors() == before
