"""One block of weights as one contiguous, aligned run of bytes: one buffer, one copy.

The same bytes lie in the host's staging buffer and in the device's slot, so a block is copied at
once, and its tensors are views. What pads the tensors is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from penstock.blocks import PAGE_BYTES, TENSOR_ALIGNMENT
from penstock.offload.checkpoint import TensorEntry, view_as_stored
from penstock.offload.files import FileStamp
from penstock.units import align_up

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_GAP = 4096
"""Bytes between two tensors of a file that are rather read along than skipped (padding tensors)."""


@dataclass(frozen=True)
class Extent:
    """One read: ``nbytes`` at ``file_offset`` of ``file`` go to ``buffer_offset``."""

    file: Path
    file_offset: int
    nbytes: int
    buffer_offset: int


@dataclass(frozen=True)
class Place:
    """A tensor in the buffer."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Inspector(Protocol):
    """Sees the bytes of one read of a block, before anything is done with them."""

    def feed(self, view: memoryview, position: int) -> None:
        """Bytes that came from the disk, from ``position`` of the buffer on; they come ascending
        and without gaps inside an extent."""

    def finish(self) -> None:
        """All bytes were fed.

        Raises:
            CheckpointError: they are not those that should be there.
        """


@dataclass(frozen=True)
class BlockLayout:
    """Where the tensors of a block lie in a buffer, and what must be read to fill it.

    Attributes:
        places: by local name; each at a multiple of `TENSOR_ALIGNMENT`.
        extents: the reads, ascending in the buffer, neighbours of a file joined.
        stamps: what each file must still be.
        nbytes: size of the buffer, a multiple of the page size (0 for no tensors).
        inspector: makes what looks at the bytes of a read; None: nothing does.
    """

    places: Mapping[str, Place]
    extents: tuple[Extent, ...]
    stamps: Mapping[Path, FileStamp | None]
    nbytes: int
    inspector: Callable[[], Inspector] | None = None

    @classmethod
    def from_entries(cls, entries: Mapping[str, TensorEntry]) -> BlockLayout:
        """Lay out ``entries`` (by local name), in the order in which their files hold them.

        They may lie in any files; two names of the same bytes share a place. A run of tensors that
        a file holds aligned is kept as it is, and becomes one read; a run that begins on a page of
        the file begins on a page of the buffer, so that it can be read directly.
        """
        packer = _Packer()
        ordered = sorted(entries.items(), key=lambda item: (str(item[1].file), item[1].offset))
        places = {name: packer.place(entry) for name, entry in ordered}
        return cls(
            places=MappingProxyType({name: places[name] for name in entries}),
            extents=tuple(packer.extents),
            stamps=MappingProxyType({entry.file: entry.stamp for entry in entries.values()}),
            nbytes=align_up(packer.end, PAGE_BYTES),
        )

    @property
    def read_bytes(self) -> int:
        """What reading the block takes from disk."""
        return sum(extent.nbytes for extent in self.extents)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors in ``buffer`` (uint8, 1-D, `nbytes` or longer), uncopied, by local
        name."""
        return {
            name: view_as_stored(
                buffer[place.offset : place.offset + place.nbytes], place.dtype, place.shape
            )
            for name, place in self.places.items()
        }


class _Packer:
    """Places tensors one after the other; they come in the order of files and bytes."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.end = 0
        self._seen: dict[tuple[Path, int, int], int] = {}

    def place(self, entry: TensorEntry) -> Place:
        """Return the next tensor's place; its bytes join the last read, or begin a new one."""
        key = (entry.file, entry.offset, entry.nbytes)
        if entry.nbytes and key not in self._seen:
            self._seen[key] = self._append(entry)
        return Place(self._seen.get(key, 0), entry.nbytes, entry.dtype, entry.shape)

    def _append(self, entry: TensorEntry) -> int:
        last = self.extents[-1] if self.extents else None
        if last is not None and _continues(last, entry):
            offset = last.buffer_offset + entry.offset - last.file_offset
            length = offset + entry.nbytes - last.buffer_offset
            self.extents[-1] = Extent(last.file, last.file_offset, length, last.buffer_offset)
        else:
            on_page = entry.offset % PAGE_BYTES == 0
            offset = align_up(self.end, PAGE_BYTES if on_page else TENSOR_ALIGNMENT)
            self.extents.append(Extent(entry.file, entry.offset, entry.nbytes, offset))
        self.end = offset + entry.nbytes
        return offset


def _continues(last: Extent, entry: TensorEntry) -> bool:
    """Return whether ``entry`` can be read along with ``last`` and is aligned where that puts
    it."""
    gap = entry.offset - last.file_offset - last.nbytes
    offset = last.buffer_offset + entry.offset - last.file_offset
    return last.file == entry.file and 0 <= gap <= _LONGEST_GAP and offset % TENSOR_ALIGNMENT == 0
