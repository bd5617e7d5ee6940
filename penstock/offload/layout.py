"""A block as one run of bytes: the same in host memory and on the device, so one copy moves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from penstock.offload.checkpoint import torch_dtype
from penstock.offload.header import TensorEntry
from penstock.units import align_up

TENSOR_ALIGNMENT = 64
"""What torch aligns its own CPU tensors to: kernels round by alignment, results must not change."""

BLOCK_ALIGNMENT = 4096
"""A page, and the sector of a disk."""


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in the run."""

    name: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """A contiguous read: ``nbytes`` at ``file_offset`` go to ``buffer_offset`` of the run."""

    file: Path
    file_offset: int
    nbytes: int
    buffer_offset: int


@dataclass(frozen=True)
class BlockLayout:
    """Tensors one after another in the order of their file, each aligned; and how to read them."""

    tensors: tuple[TensorSlot, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @classmethod
    def from_entries(cls, entries: Mapping[str, TensorEntry]) -> BlockLayout:
        """The layout of some tensors of a checkpoint, by the names they shall have."""
        order = sorted(entries.items(), key=lambda item: (str(item[1].file), item[1].offset))
        slots: list[TensorSlot] = []
        extents: list[Extent] = []
        at = 0
        for name, entry in order:
            slots.append(TensorSlot(name, at, entry.nbytes, entry.dtype, entry.shape))
            _append(extents, Extent(entry.file, entry.offset, entry.nbytes, at))
            at = align_up(at + entry.nbytes, TENSOR_ALIGNMENT)
        return cls(tuple(slots), tuple(extents), align_up(at, BLOCK_ALIGNMENT))

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in ``buffer`` (uint8, ``nbytes`` or longer), as views.

        Raises:
            ValueError: the buffer is too short.
        """
        if buffer.numel() < self.nbytes:
            raise ValueError(f"a buffer of {buffer.numel()} bytes for a block of {self.nbytes}")
        return {
            slot.name: buffer[slot.offset : slot.offset + slot.nbytes]
            .view(torch_dtype(slot.dtype))
            .view(slot.shape)
            for slot in self.tensors
        }


def _append(extents: list[Extent], new: Extent) -> None:
    """Join ``new`` to the last extent where it continues it in the file and in the buffer."""
    last = extents[-1] if extents else None
    if (
        last is not None
        and last.file == new.file
        and last.file_offset + last.nbytes == new.file_offset
        and last.buffer_offset + last.nbytes == new.buffer_offset
    ):
        joined = Extent(last.file, last.file_offset, last.nbytes + new.nbytes, last.buffer_offset)
        extents[-1] = joined
    elif new.nbytes:
        extents.append(new)
