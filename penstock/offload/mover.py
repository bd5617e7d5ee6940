"""Moves bytes between the tiers, counts and times them, and does a schedule's reads and copies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from penstock.offload.layout import BlockLayout, Inspector
from penstock.offload.schedule import Compute, Copy, Queue, Read, Residency
from penstock.offload.tiers import DiskTier, HostBuffer, Link


@dataclass
class StreamStats:
    """What moved, and who waited for whom, residents included. Every field only grows.

    Attributes:
        read_bytes: from disk to host memory.
        direct_bytes: those of them that went around the page cache.
        copied_bytes: from host memory to the device.
        pageable_bytes: host buffers that the CUDA driver refused to pin.
        read_s: seconds in which the disk was reading.
        copy_s: seconds in which the link was copying.
        slab_wait_s: reading waited for a free slab.
        disk_wait_s: copying waited for a read (disk -> host is too slow).
        slot_wait_s: copying waited for a free slot; on CUDA, for its last use to be issued.
        compute_wait_s: the computation waited for a block (host -> device is too slow); on CUDA, by
            the device's own clock.
    """

    read_bytes: int = 0
    direct_bytes: int = 0
    copied_bytes: int = 0
    pageable_bytes: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0
    slab_wait_s: float = 0.0
    disk_wait_s: float = 0.0
    slot_wait_s: float = 0.0
    compute_wait_s: float = 0.0

    def add_seconds(self, field: str, seconds: float) -> None:
        """Add to one of the fields; each has one thread that adds to it."""
        setattr(self, field, getattr(self, field) + seconds)


@dataclass(frozen=True)
class Carrier:
    """Disk, link and statistics: one read or one copy a call."""

    disk: DiskTier
    link: Link
    stats: StreamStats

    def read(self, layout: BlockLayout, target: HostBuffer) -> None:
        """Read a block to the beginning of ``target``.

        Raises:
            CheckpointError: the layout's inspector has found other bytes than it expects.
        """
        with _inspected(layout) as inspector:
            self._read(layout, target, 0, layout.nbytes, inspector)

    def _read(
        self,
        layout: BlockLayout,
        target: HostBuffer,
        start: int,
        stop: int,
        inspector: Inspector | None,
    ) -> None:
        began = time.perf_counter()
        moved = self.disk.read(layout, target.view[: stop - start], start, stop, inspector)
        self.stats.add_seconds("read_s", time.perf_counter() - began)
        self.stats.read_bytes += moved.nbytes
        self.stats.direct_bytes += moved.direct_bytes

    def copy(self, target: Tensor, source: HostBuffer) -> None:
        """Issue a copy of as many bytes as ``target`` has."""
        with self.link.timed(Queue.COPY, partial(self.stats.add_seconds, "copy_s")):
            self.link.copy(target, source.tensor[: target.numel()])
        self.stats.copied_bytes += target.numel()

    def load(self, layout: BlockLayout, through: HostBuffer, target: Tensor) -> None:
        """Bring a block to the device now, by way of a host buffer that may be smaller than it.

        Raises:
            CheckpointError: as `read` does, when all of it has come.
        """
        step = through.tensor.numel()
        with _inspected(layout) as inspector:
            for start in range(0, layout.nbytes, step):
                stop = min(start + step, layout.nbytes)
                self._read(layout, through, start, stop, inspector)
                self.copy(target[start:stop], through)
                self.link.drain()


@contextmanager
def _inspected(layout: BlockLayout) -> Iterator[Inspector | None]:
    """What is to be fed the bytes of one read of ``layout``; its verdict comes at the end."""
    inspector = None if layout.inspector is None else layout.inspector()
    yield inspector
    if inspector is not None:
        inspector.finish()


@dataclass(frozen=True)
class Buffers:
    """All memory of a stream: blocks that stay, and the two rings. The tiers empty these lists."""

    resident: list[Tensor]
    slots: list[Tensor]
    kept: list[HostBuffer]
    slabs: list[HostBuffer]


class Mover:
    """Does the operations of a schedule in the buffers of a stream."""

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        residency: Residency,
        buffers: Buffers,
        carrier: Carrier,
    ) -> None:
        self.carrier, self.link, self.stats = carrier, carrier.link, carrier.stats
        self._layouts, self._buffers = layouts, buffers
        self._resident_at = {block: at for at, block in enumerate(residency.device_resident)}
        self._kept_at = {block: at for at, block in enumerate(residency.host_resident)}

    def tensors(self, op: Compute) -> dict[str, Tensor]:
        """What ``op`` computes with."""
        if op.slot is None:
            buffer = self._buffers.resident[self._resident_at[op.block]]
        else:
            buffer = self._buffers.slots[op.slot]
        return self._layouts[op.block].views(buffer)

    def do(self, op: Read | Copy) -> None:
        """Read, or issue a copy, after what it must wait for on the device's side."""
        for ref in op.after:
            self.link.wait(op.ref.queue, ref)
        if isinstance(op, Read):
            self.carrier.read(self._layouts[op.block], self._buffers.slabs[op.slab])
        else:
            target = self._buffers.slots[op.slot][: self._layouts[op.block].nbytes]
            self.carrier.copy(target, self._source(op))
        self.link.record(op.ref)

    def _source(self, op: Copy) -> HostBuffer:
        if op.slab is None:
            return self._buffers.kept[self._kept_at[op.block]]
        return self._buffers.slabs[op.slab]
