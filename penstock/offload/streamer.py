"""Executes a schedule: blocks come from disk and host memory just ahead of the computation.

`_Overlapped` gives each queue a thread (computing is the caller's); `_Sequential` does the same
operations one after another, and is what the other must equal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from penstock.errors import UsageError
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.mover import Buffers, Carrier, Mover, StreamStats
from penstock.offload.schedule import (
    Compute,
    Copy,
    Queue,
    Read,
    Ref,
    Residency,
    build_schedule,
)
from penstock.offload.tiers import DeviceTier, DiskTier, HostTier, open_link
from penstock.units import MIB

__all__ = ["STAGING_BYTES", "BlockStream", "StreamStats", "load_block"]

STAGING_BYTES = 64 * MIB
"""The most host memory through which weights are read that stay on the device."""

Tensors = dict[str, Tensor]
_Kind = TypeVar("_Kind", Read, Copy, Compute)


class BlockStream:
    """The blocks of a network, in order, again and again, on the device; a context manager.

    Entering allocates every buffer, loads the residents and begins to read ahead; leaving, at any
    moment and for any reason, ends all threads and gives every byte back.

    Args:
        layouts: one a block.
        residency: where each block lives.
        cycles: passes over all blocks that will be asked for; nothing is fetched beyond the last.
        device: where tensors are wanted.
        device_ledger, host_ledger: every buffer is reserved there first.
        overlapped: work ahead of the computation; False is the sequential reference.
        should_stop: called before each resident block is loaded; ends the loading by raising.

    Attributes:
        stats: what moved and who waited, so far.

    Raises:
        UsageError: residency, layouts and cycles do not fit together.
        LedgerOverflow: (on entry) the buffers do not fit the budgets.
        CheckpointChanged: (on entry, or while streaming) a file is no longer what it was.
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
        should_stop: Callable[[], None] = lambda: None,
    ) -> None:
        if len(layouts) != residency.n_blocks:
            raise UsageError(
                "every block needs a layout",
                expected=str(residency.n_blocks),
                found=str(len(layouts)),
            )
        self.stats = StreamStats()
        self._layouts, self._residency = tuple(layouts), residency
        self._computes = _queue_of(residency, cycles, Compute)
        self._cycles, self._overlapped = cycles, overlapped
        self._should_stop = should_stop
        self._device = DeviceTier(device, device_ledger)
        self._host = HostTier(host_ledger, device)
        self._loop: _Loop | None = None
        self._stack = ExitStack()

    def __enter__(self) -> BlockStream:
        with ExitStack() as stack:
            self._loop = self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> _Loop:
        disk = DiskTier()
        stack.callback(disk.close)
        buffers = self._allocate(stack)
        self.stats.pageable_bytes = self._host.pageable_bytes
        # After the allocation: on CUDA the link begins behind whatever used that memory before.
        link = open_link(self._device.device, self._residency.longest_wait)
        stack.callback(link.drain)
        carrier = Carrier(disk, link, self.stats)
        self._mover = Mover(self._layouts, self._residency, buffers, carrier)
        self._load_residents(buffers, carrier)
        loop = _Overlapped if self._overlapped else _Sequential
        loop_here: _Loop = loop(self._mover, self._residency, self._cycles)
        stack.callback(loop_here.close)
        return loop_here

    def _allocate(self, stack: ExitStack) -> Buffers:
        places, device, host = self._residency, self._device, self._host
        resident, streamed, kept, from_disk = (
            [self._layouts[block].nbytes for block in blocks]
            for blocks in (
                places.device_resident,
                places.streamed,
                places.host_resident,
                places.disk_blocks,
            )
        )
        slots = [max(streamed, default=0)] * places.device_slots
        slabs = [max(from_disk, default=0)] * places.host_slabs
        return Buffers(
            resident=stack.enter_context(device.buffers("resident blocks", resident)),
            slots=stack.enter_context(device.buffers("block slots", slots)),
            kept=stack.enter_context(host.buffers("resident blocks", kept)),
            slabs=stack.enter_context(host.buffers("block slabs", slabs)),
        )

    def _load_residents(self, buffers: Buffers, carrier: Carrier) -> None:
        places, layouts = self._residency, self._layouts
        for block, kept in zip(places.host_resident, buffers.kept, strict=True):
            self._should_stop()
            carrier.read(layouts[block], kept)
        if not places.device_resident:
            return
        largest = max(layouts[block].nbytes for block in places.device_resident)
        with ExitStack() as stack:
            if places.disk_blocks:
                through = buffers.slabs[0]
            else:
                through = stack.enter_context(self._host.staging(largest, STAGING_BYTES))
            for block, target in zip(places.device_resident, buffers.resident, strict=True):
                self._should_stop()
                carrier.load(layouts[block], through, target)

    def cycle(self) -> Iterator[tuple[int, Tensors]]:
        """One pass over the blocks: each index with its tensors by local name.

        The body of the loop is the computation (on CUDA: issues it, on the stream that was current
        on entry). The tensors are views of a buffer that is filled again afterwards.

        Raises:
            UsageError: the stream was opened for fewer passes, or the last one was not finished.
            CheckpointChanged, OSError, ...: whatever a thread ran into, as itself.
        """
        for index in range(self._residency.n_blocks):
            loop = self._loop
            if loop is None:
                raise UsageError("the stream is closed", remedy="Enter it with a with statement.")
            op = next(self._computes, None)
            if op is None or op.block != index:
                raise UsageError(
                    "the stream has no such pass",
                    expected=f"at most {self._cycles} passes, each to its end",
                    found="one more" if op is None else f"a pass that was left at block {op.block}",
                )
            loop.bring(op)
            yield index, self._mover.tensors(op)
            loop.leave(op)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop = None
        self._stack.close()


@contextmanager
def load_block(
    layout: BlockLayout,
    *,
    device: torch.device,
    device_ledger: ByteLedger,
    host_ledger: ByteLedger,
) -> Iterator[Tensors]:
    """Weights that stay on the device, by name, until the context ends. They are read through a
    host buffer of at most `STAGING_BYTES`, which is gone when the tensors are given.

    Raises:
        LedgerOverflow: they do not fit the budgets.
        CheckpointChanged: a file is no longer what it was.
    """
    with ExitStack() as stack:
        tier = DeviceTier(device, device_ledger)
        (buffer,) = stack.enter_context(tier.buffers("non-block weights", [layout.nbytes]))
        host = HostTier(host_ledger, device)
        with ExitStack() as loading:
            disk = DiskTier()
            loading.callback(disk.close)
            through = loading.enter_context(host.staging(layout.nbytes, STAGING_BYTES))
            Carrier(disk, open_link(device, 1), StreamStats()).load(layout, through, buffer)
        yield layout.views(buffer)


class _Loop(Protocol):
    """Makes sure that a block is there when it is computed with."""

    def bring(self, op: Compute) -> None:
        """Return when the computation may be issued."""

    def leave(self, op: Compute) -> None:
        """The computation was issued: its slot may be filled again behind it."""

    def close(self) -> None:
        """Stop, wherever it is."""


class _Sequential:
    """Reads, copies and computes one after another, in the schedule's own order."""

    def __init__(self, mover: Mover, residency: Residency, cycles: int) -> None:
        self._mover, self._link = mover, mover.link
        self._ops = build_schedule(residency, cycles)

    def bring(self, op: Compute) -> None:
        """Do everything that comes before ``op``."""
        with self._link.timed(
            Queue.COMPUTE, partial(self._mover.stats.add_seconds, "compute_wait_s")
        ):
            for earlier in self._ops:
                if isinstance(earlier, Compute):
                    break
                self._mover.do(earlier)
            for ref in op.after:
                self._link.wait(Queue.COMPUTE, ref)

    def leave(self, op: Compute) -> None:
        """Mark its end."""
        self._link.record(op.ref)

    def close(self) -> None:
        """Nothing runs."""


class _Overlapped:
    """A thread reads ahead and another copies ahead, as far as the rings allow."""

    def __init__(self, mover: Mover, residency: Residency, cycles: int) -> None:
        self._mover, self._link, self._board = mover, mover.link, _Board()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="penstock-stream")
        for ops in (_queue_of(residency, cycles, Read), _queue_of(residency, cycles, Copy)):
            self._threads.submit(self._work, ops).add_done_callback(self._board.note_end)

    def _work(self, ops: Iterator[Read | Copy]) -> None:
        stats = self._mover.stats
        for op in ops:
            for ref in op.after:
                waited = self._board.wait(ref)
                if waited is None:
                    return
                stats.add_seconds(_WAITS[op.ref.queue, ref.queue], waited)
            if self._board.is_stopped:  # the first operations wait for nothing
                return
            self._mover.do(op)
            self._board.mark(op.ref)

    def bring(self, op: Compute) -> None:
        """Wait until the block's copy is issued, and let the computation follow it."""
        with self._link.timed(
            Queue.COMPUTE, partial(self._mover.stats.add_seconds, "compute_wait_s")
        ):
            self._board.raise_failure()
            for ref in op.after:
                self._board.wait(ref)
                self._board.raise_failure()
                self._link.wait(Queue.COMPUTE, ref)

    def leave(self, op: Compute) -> None:
        """Mark its end, for the device and for the other threads."""
        self._link.record(op.ref)
        self._board.mark(op.ref)

    def close(self) -> None:
        """Let the threads end after what they are at, and wait for them."""
        self._board.stop()
        self._threads.shutdown()


_WAITS = {
    (Queue.READ, Queue.COPY): "slab_wait_s",
    (Queue.COPY, Queue.READ): "disk_wait_s",
    (Queue.COPY, Queue.COMPUTE): "slot_wait_s",
}


class _Board:
    """How far each queue has come (it works in the order of visits), and whether all is well."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last = dict.fromkeys(Queue, -1)
        self._failure: BaseException | None = None
        self.is_stopped = False

    def mark(self, ref: Ref) -> None:
        """``ref`` is issued."""
        with self._changed:
            self._last[ref.queue] = ref.visit
            self._changed.notify_all()

    def wait(self, ref: Ref) -> float | None:
        """Wait until ``ref`` is issued; seconds, or None if everything was stopped instead."""
        with self._changed:
            began = time.perf_counter()
            self._changed.wait_for(lambda: self.is_stopped or self._last[ref.queue] >= ref.visit)
            return None if self.is_stopped else time.perf_counter() - began

    def raise_failure(self) -> None:
        """Raise what ended a thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def note_end(self, thread: Future[None]) -> None:
        """A thread has ended; if by an exception, so does everything else."""
        if thread.exception() is not None:
            with self._changed:
                self._failure = self._failure or thread.exception()
            self.stop()

    def stop(self) -> None:
        """Wake everybody up, to end."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify_all()


def _queue_of(residency: Residency, cycles: int, kind: type[_Kind]) -> Iterator[_Kind]:
    return (op for op in build_schedule(residency, cycles) if isinstance(op, kind))
