"""Moves bytes between the tiers, counts and times them, and does a schedule's reads and copies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from penstock.offload.layout import BlockLayout, Inspector
from penstock.offload.schedule import Compute, Copy, Queue, Read, Residency
from penstock.offload.stats import StreamStats
from penstock.offload.tiers import DiskTier, HostBuffer, Link


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
        self.stats.add("read_s", time.perf_counter() - began)
        self.stats.add("read_bytes", moved.nbytes)
        self.stats.add("direct_bytes", moved.direct_bytes)

    def copy(self, target: Tensor, source: HostBuffer) -> None:
        """Issue a copy of as many bytes as ``target`` has."""
        with self.link.timed(Queue.COPY, partial(self.stats.add, "copy_s")):
            self.link.copy(target, source.tensor[: target.numel()])
        self.stats.add("copied_bytes", target.numel())

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
                self.link.land()


@contextmanager
def _inspected(layout: BlockLayout) -> Iterator[Inspector | None]:
    """Provide what is to be fed the bytes of one read of ``layout``; its verdict comes at the
    end."""
    inspector = None if layout.inspector is None else layout.inspector()
    yield inspector
    if inspector is not None:
        inspector.finish()


@dataclass
class Buffers:
    """All memory of a stream: blocks that stay, and the two rings. The tiers empty these lists;
    those of the device come when it is the stream's turn."""

    kept: list[HostBuffer]
    staging: list[HostBuffer]
    resident: list[Tensor] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)


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
        self.buffers, self._layouts = buffers, layouts
        self._resident_at = {block: at for at, block in enumerate(residency.device_resident)}
        self._kept_at = {block: at for at, block in enumerate(residency.host_resident)}

    def tensors(self, op: Compute) -> dict[str, Tensor]:
        """Return what ``op`` computes with."""
        return self._layouts[op.block].views(self._on_device(op))

    @contextmanager
    def computing(self, op: Compute) -> Iterator[None]:
        """Count the time inside as the computation's, with ``op``'s block."""
        self.stats.add("visited_bytes", self._layouts[op.block].nbytes)
        with self.link.timed(Queue.COMPUTE, partial(self.stats.add, "compute_s")):
            yield

    def do(self, op: Read | Copy, *, moves: bool = True) -> None:
        """Read, or issue a copy, after what it must wait for on the device's side.

        Args:
            moves: False: only wait, and mark the place in the queue.
        """
        for ref in op.after:
            self.link.wait(op.ref.queue, ref)
        if not moves:
            pass
        elif isinstance(op, Read):
            self.carrier.read(self._layouts[op.block], self._in_host(op))
        else:
            target = self._on_device(op)[: self._layouts[op.block].nbytes]
            self.carrier.copy(target, self._in_host(op))
        self.link.record(op.ref)

    def _in_host(self, op: Read | Copy) -> HostBuffer:
        if op.buffer is None:
            return self.buffers.kept[self._kept_at[op.block]]
        return self.buffers.staging[op.buffer]

    def _on_device(self, op: Copy | Compute) -> Tensor:
        if op.slot is None:
            return self.buffers.resident[self._resident_at[op.block]]
        return self.buffers.slots[op.slot]
