"""Moves bytes between the tiers, counts and times them, and does a schedule's reads and copies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from penstock.offload.layout import BlockLayout
from penstock.offload.schedule import Compute, Copy, Queue, Read, Residency
from penstock.offload.stats import StreamStats
from penstock.offload.tiers import DiskTier, HostBuffer, Link


@dataclass(frozen=True)
class Carrier:
    """Disk, link and statistics: one read or one copy a call."""

    disk: DiskTier
    link: Link
    stats: StreamStats

    def read(
        self, layout: BlockLayout, target: HostBuffer, start: int = 0, stop: int | None = None
    ) -> None:
        """Read a block, or its bytes from ``start`` to ``stop``, to the beginning of ``target``."""
        stop = layout.nbytes if stop is None else stop
        began = time.perf_counter()
        moved = self.disk.read(layout, target.view[: stop - start], start, stop)
        self.stats.add_seconds("read_s", time.perf_counter() - began)
        self.stats.read_bytes += moved.nbytes
        self.stats.direct_bytes += moved.direct_bytes

    def copy(self, target: Tensor, source: HostBuffer) -> None:
        """Issue a copy of as many bytes as ``target`` has."""
        with self.link.timed(Queue.COPY, partial(self.stats.add_seconds, "copy_s")):
            self.link.copy(target, source.tensor[: target.numel()])
        self.stats.copied_bytes += target.numel()

    def load(self, layout: BlockLayout, through: HostBuffer, target: Tensor) -> None:
        """Bring a block to the device now, by way of a host buffer that may be smaller than it."""
        step = through.tensor.numel()
        for start in range(0, layout.nbytes, step):
            stop = min(start + step, layout.nbytes)
            self.read(layout, through, start, stop)
            self.copy(target[start:stop], through)
            self.link.drain()


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

    @contextmanager
    def computing(self, op: Compute) -> Iterator[None]:
        """The time inside is the computation's, with ``op``'s block."""
        self.stats.visited_bytes += self._layouts[op.block].nbytes
        with self.link.timed(Queue.COMPUTE, partial(self.stats.add_seconds, "compute_s")):
            yield

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
