"""Disk, host memory and device: who allocates, who reads, who copies. Bytes are reserved first."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.offload.files import FileReader
from penstock.offload.layout import BlockLayout, Extent
from penstock.offload.ledger import ByteLedger
from penstock.units import MIB, align_up

STAGING_BYTES = 64 * MIB
"""The most host memory through which weights are read that go to the device once and stay."""


class DiskTier:
    """Reads blocks from their files into host memory."""

    def __init__(self) -> None:
        self._reader = FileReader()

    def read(self, layout: BlockLayout, slab: Tensor) -> None:
        """Fill ``slab`` with the block.

        Raises:
            CheckpointChanged: a file is gone or too short.
        """
        for extent in layout.extents:
            place = slab[extent.buffer_offset : extent.buffer_offset + extent.nbytes]
            self._reader.read_into(extent.file, extent.file_offset, place)

    def read_part(self, extent: Extent, done: int, piece: Tensor) -> None:
        """Fill ``piece`` with bytes of ``extent`` from its byte ``done`` on."""
        self._reader.read_into(extent.file, extent.file_offset + done, piece)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class HostTier:
    """Page-aligned buffers in host memory, registered with the driver where there is one.

    torch's own pinned allocator rounds up to powers of two; these take what they say, rounded to
    a page.

    Args:
        ledger: every buffer is reserved in it first.
        pinned: register buffers with CUDA, so that copies run at the link's speed and alongside.
    """

    def __init__(self, ledger: ByteLedger, *, pinned: bool) -> None:
        self._ledger, self._pinned = ledger, pinned
        self.pageable_buffers = 0

    @contextmanager
    def buffer(self, label: str, nbytes: int) -> Iterator[Tensor]:
        """A uint8 buffer of ``nbytes``.

        Raises:
            LedgerOverflow: the budget does not hold it.
        """
        with self._ledger.reserve(label, nbytes), ExitStack() as registered:
            memory = mmap.mmap(-1, align_up(max(nbytes, 1), mmap.PAGESIZE))
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            if self._pinned and not self._register(whole, registered):
                self.pageable_buffers += 1
            yield whole[:nbytes]

    def _register(self, whole: Tensor, registered: ExitStack) -> bool:
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), 0)
        if int(status) != 0:
            return False
        registered.callback(runtime.cudaHostUnregister, whole.data_ptr())
        return True


class DeviceTier:
    """Flat buffers on the device.

    Args:
        device: where.
        ledger: every buffer is reserved in it first.
    """

    def __init__(self, device: torch.device, ledger: ByteLedger) -> None:
        self.device, self._ledger = device, ledger

    @contextmanager
    def buffer(self, label: str, nbytes: int) -> Iterator[Tensor]:
        """A uint8 buffer of ``nbytes``.

        Raises:
            LedgerOverflow: the budget does not hold it.
        """
        with self._ledger.reserve(label, nbytes):
            yield torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class Link(Protocol):
    """How bytes get from host memory to the device, and how a copy and a computation wait for each
    other. A token stands for a moment in one of the two queues."""

    def copy(self, slot: Tensor, slab: Tensor, after: Any) -> Any:
        """Start the copy once the computation has passed ``after``; a token for its end."""

    def await_copy(self, copied: Any) -> None:
        """Let the computation go on only when the copy is complete; the host does not wait."""

    def computed(self) -> Any:
        """A token for the end of all computation that was asked for so far."""

    def await_copy_on_host(self, copied: Any) -> None:
        """Wait here until the copy is complete: its source is about to be overwritten."""


class CpuLink:
    """The device is host memory under a cap: a copy is complete when the call returns."""

    def copy(self, slot: Tensor, slab: Tensor, after: Any) -> None:
        """Copy now."""
        slot[: slab.numel()].copy_(slab)

    def await_copy(self, copied: Any) -> None:
        """Nothing to wait for."""

    def computed(self) -> None:
        """Nothing is outstanding."""

    def await_copy_on_host(self, copied: Any) -> None:
        """Nothing to wait for."""


class CudaLink:
    """A copy stream beside the compute stream, and events between them."""

    def __init__(self, device: torch.device) -> None:
        self._compute = torch.cuda.current_stream(device)
        self._copy = torch.cuda.Stream(device)

    def copy(self, slot: Tensor, slab: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        """Enqueue the copy behind ``after``."""
        if after is not None:
            self._copy.wait_event(after)
        with torch.cuda.stream(self._copy):
            slot[: slab.numel()].copy_(slab, non_blocking=True)
        return self._copy.record_event()

    def await_copy(self, copied: torch.cuda.Event) -> None:
        """The compute stream waits."""
        self._compute.wait_event(copied)

    def computed(self) -> torch.cuda.Event:
        """An event at the end of the compute stream."""
        return self._compute.record_event()

    def await_copy_on_host(self, copied: torch.cuda.Event) -> None:
        """The calling thread waits."""
        copied.synchronize()


def make_link(device: torch.device) -> Link:
    """The link to ``device``."""
    return CudaLink(device) if device.type == "cuda" else CpuLink()
