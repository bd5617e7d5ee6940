"""Executes a schedule: blocks come from disk and host memory just ahead of the computation.

`Overlapped` has a thread that reads and one that copies; `Sequential` does the same operations one
after another and is what the other must equal. The only file with threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Compute, Copy, Read, Residency, build_schedule
from penstock.offload.tiers import STAGING_BYTES, DeviceTier, DiskTier, HostTier, make_link

Tensors = dict[str, Tensor]


@dataclass
class StreamStats:
    """What moved, and who waited for whom.

    Attributes:
        read_bytes: from disk to host memory. copied_bytes: from there to the device.
        read_wait_s: reading waited for a free slab.
        copy_wait_s: copying waited for a read or for a free slot.
        compute_wait_s: the computation waited for a copy.
    """

    read_bytes: int = 0
    copied_bytes: int = 0
    read_wait_s: float = 0.0
    copy_wait_s: float = 0.0
    compute_wait_s: float = 0.0


class BlockStream:
    """The blocks of a network, one at a time and in order, on the device.

    Args:
        layouts: one a block.
        residency: where each lives.
        cycles: passes over all blocks that will be asked for; nothing is fetched beyond the last.
        device_ledger, host_ledger: every buffer is reserved there first.
        overlapped: work ahead of the computation; False is the sequential reference.

    Raises (on entry):
        LedgerOverflow: the residency does not fit the budgets.
        CheckpointChanged: a file is gone or too short (also while streaming).
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        residency: Residency,
        *,
        cycles: int,
        device: torch.device,
        device_ledger: ByteLedger,
        host_ledger: ByteLedger,
        overlapped: bool = True,
    ) -> None:
        self.stats = StreamStats()
        self._layouts, self._residency = layouts, residency
        self._host = HostTier(host_ledger, pinned=device.type == "cuda")
        self._device = DeviceTier(device, device_ledger)
        self._disk = DiskTier()
        self._link = make_link(device)
        self._overlapped = overlapped
        self._cycles = cycles
        self._stack = ExitStack()

    def __enter__(self) -> BlockStream:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        stack.callback(self._disk.close)
        places, layouts = self._residency, self._layouts
        largest = max(layout.nbytes for layout in layouts)
        self._on_device = {
            block: stack.enter_context(self._device.buffer("resident block", layouts[block].nbytes))
            for block in places.device_resident
        }
        self._in_ram = {
            block: stack.enter_context(self._host.buffer("resident block", layouts[block].nbytes))
            for block in places.host_resident
        }
        load_staged(self._disk, self._host, [(layouts[b], t) for b, t in self._on_device.items()])
        for block, buffer in self._in_ram.items():
            self._disk.read(layouts[block], buffer)
        self.stats.read_bytes += sum(
            layouts[block].nbytes for block in (*places.device_resident, *places.host_resident)
        )
        self._slots = [
            stack.enter_context(self._device.buffer("block slot", largest))
            for _ in range(places.device_slots)
        ]
        self._slabs = [
            stack.enter_context(self._host.buffer("block slab", largest))
            for _ in range(places.host_slabs)
        ]
        loop = Overlapped if self._overlapped else Sequential
        self._loop = stack.enter_context(loop(self))

    def cycle(self) -> Iterator[tuple[int, Tensors]]:
        """One pass: each block's index and its tensors by name, valid inside the loop's body."""
        for _ in self._layouts:
            op, finish = self._loop.next_block()
            buffer = self._on_device[op.block] if op.slot is None else self._slots[op.slot]
            try:
                yield op.block, self._layouts[op.block].views(buffer)
            finally:
                finish()

    def ops(self) -> Iterator[Read | Copy | Compute]:
        """The schedule."""
        return build_schedule(self._residency, self._cycles)

    def read(self, op: Read) -> None:
        """Do a read."""
        layout = self._layouts[op.block]
        self._disk.read(layout, self._slabs[op.slab])
        self.stats.read_bytes += layout.nbytes

    def copy(self, op: Copy, after: Any) -> Any:
        """Start a copy; returns the link's token for its end."""
        layout = self._layouts[op.block]
        source = self._in_ram[op.block] if op.slab is None else self._slabs[op.slab]
        self.stats.copied_bytes += layout.nbytes
        return self._link.copy(self._slots[op.slot], source[: layout.nbytes], after)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._on_device, self._in_ram, self._slots, self._slabs = {}, {}, [], []


Finish = Callable[[], None]


class Sequential:
    """Reads, copies and computes one after another, in the schedule's own order."""

    def __init__(self, stream: BlockStream) -> None:
        self._stream, self._link = stream, stream._link
        self._ops = stream.ops()

    def __enter__(self) -> Sequential:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def next_block(self) -> tuple[Compute, Finish]:
        """Bring the next block; ``finish`` is called after its computation."""
        for op in self._ops:
            if isinstance(op, Read):
                self._stream.read(op)
            elif isinstance(op, Copy):
                copied = self._stream.copy(op, self._link.computed())
                self._link.await_copy(copied)
                self._link.await_copy_on_host(copied)
            else:
                return op, lambda: None
        raise RuntimeError("more passes were asked for than the stream was opened for")


class Overlapped:
    """A thread reads ahead and another copies ahead, as far as the rings allow.

    Each of the three queues runs in order, so "visit v is done" is one number a queue; whoever
    depends on a visit waits until the number has reached it.
    """

    def __init__(self, stream: BlockStream) -> None:
        self._stream, self._link = stream, stream._link
        self._changed = threading.Condition()
        self._read = self._copied = self._computed = -1
        places = stream._residency
        self._into_slot: list[Any] = [None] * places.device_slots
        self._out_of_slab: list[Any] = [None] * places.host_slabs
        self._last_use: list[Any] = [None] * places.device_slots
        self._stopped = False
        self._error: BaseException | None = None
        self._computes = (op for op in stream.ops() if isinstance(op, Compute))

    def __enter__(self) -> Overlapped:
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"penstock-{name}")
            for name, work in (("read", self._read_all), ("copy", self._copy_all))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for token in self._into_slot:
            if token is not None:
                self._link.await_copy_on_host(token)

    def next_block(self) -> tuple[Compute, Finish]:
        """Wait for the next block; ``finish`` is called after its computation was asked for."""
        op = next(self._computes, None)
        if op is None:
            raise RuntimeError("more passes were asked for than the stream was opened for")
        if op.slot is None:
            return op, lambda: None
        self._stream.stats.compute_wait_s += self._wait(lambda: self._copied >= op.visit)
        if self._error is not None and self._copied < op.visit:
            raise self._error
        self._link.await_copy(self._into_slot[op.slot])
        return op, lambda: self._finish(op)

    def _finish(self, op: Compute) -> None:
        assert op.slot is not None
        self._last_use[op.slot] = self._link.computed()
        self._advance("_computed", op.visit)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _read_all(self) -> None:
        for op in self._stream.ops():
            if isinstance(op, Read):
                self._stream.stats.read_wait_s += self._wait(partial(self._slab_is_free, op))
                if self._over:
                    return
                if op.after_copy is not None:
                    self._link.await_copy_on_host(self._out_of_slab[op.slab])
                self._stream.read(op)
                self._advance("_read", op.visit)

    def _copy_all(self) -> None:
        for op in self._stream.ops():
            if isinstance(op, Copy):
                self._stream.stats.copy_wait_s += self._wait(partial(self._ready_to_copy, op))
                if self._over:
                    return
                copied = self._stream.copy(op, self._last_use[op.slot])
                self._into_slot[op.slot] = copied
                if op.slab is not None:
                    self._out_of_slab[op.slab] = copied
                self._advance("_copied", op.visit)

    def _slab_is_free(self, op: Read) -> bool:
        return op.after_copy is None or self._copied >= op.after_copy

    def _ready_to_copy(self, op: Copy) -> bool:
        was_read = op.slab is None or self._read >= op.visit
        return was_read and (op.after_compute is None or self._computed >= op.after_compute)

    @property
    def _over(self) -> bool:
        return self._stopped or self._error is not None

    def _advance(self, queue: str, visit: int) -> None:
        with self._changed:
            setattr(self, queue, visit)
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> float:
        with self._changed:
            if condition() or self._over:
                return 0.0
            started = time.perf_counter()
            self._changed.wait_for(lambda: condition() or self._over)
            return time.perf_counter() - started


def load_staged(
    disk: DiskTier, host: HostTier, targets: Sequence[tuple[BlockLayout, Tensor]]
) -> None:
    """Read each layout into its device buffer, piece by piece through a bounded host buffer."""
    if not targets:
        return
    room = min(STAGING_BYTES, max(layout.nbytes for layout, _ in targets))
    with host.buffer("staging", room) as staging:
        for layout, target in targets:
            for extent in layout.extents:
                for done in range(0, extent.nbytes, room):
                    piece = staging[: min(room, extent.nbytes - done)]
                    disk.read_part(extent, done, piece)
                    at = extent.buffer_offset + done
                    target[at : at + piece.numel()].copy_(piece)


@contextmanager
def load_block(
    layout: BlockLayout,
    *,
    device: torch.device,
    device_ledger: ByteLedger,
    host_ledger: ByteLedger,
) -> Iterator[Tensors]:
    """Weights that stay on the device for a phase, by name.

    Raises:
        LedgerOverflow: they do not fit the budgets; CheckpointChanged: a file changed.
    """
    disk = DiskTier()
    host = HostTier(host_ledger, pinned=device.type == "cuda")
    try:
        with DeviceTier(device, device_ledger).buffer("non-block weights", layout.nbytes) as buffer:
            load_staged(disk, host, [(layout, buffer)])
            yield layout.views(buffer)
    finally:
        disk.close()
