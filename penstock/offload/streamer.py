"""Executes a schedule: blocks come from disk and host memory just ahead of the computation.

`_Overlapped` gives each queue a thread (computing is the caller's); `_Sequential` does the same
operations one after another, and is what the other must equal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from penstock.blocks import STAGING_BYTES
from penstock.closing import Closing
from penstock.errors import UsageError
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.mover import Buffers, Carrier, Mover
from penstock.offload.schedule import Compute, Copy, Queue, Read, Ref, Residency, build_schedule
from penstock.offload.stats import Flow, StreamStats
from penstock.offload.tiers import DeviceTier, DiskTier, HostTier, open_link
from penstock.units import format_bytes

log = logging.getLogger(__name__)

__all__ = ["STAGING_BYTES", "BlockStream", "Flow", "StreamStats", "load_block"]

Tensors = dict[str, Tensor]
_Kind = TypeVar("_Kind", Read, Copy, Compute)


class BlockStream(Closing):
    """The blocks of a network, in order, again and again, on the device; a context manager.

    Entering allocates every buffer and begins to fetch; leaving, at any moment and for any reason,
    ends all threads and gives every byte back. `ahead` opens the host's half earlier.

    Args:
        layouts: one a block.
        residency: where each block lives.
        passes: passes over all blocks that will be asked for; nothing is fetched beyond the last.
        device: where tensors are wanted.
        device_ledger, host_ledger: every buffer is reserved there first.
        overlapped: work ahead of the computation; False is the sequential reference.
        sure: passes of them that are sure to come: nothing is fetched beyond these until
            :meth:`expect` names more; None: all.
        should_stop: called before each block that is loaded on entry; ends the loading by raising.

    Attributes:
        stats: what moved and who waited, so far.
        notices: what is otherwise than asked for, and slower for it.

    Raises:
        UsageError: residency, layouts and passes do not fit together.
        LedgerOverflow: (on entry) the buffers do not fit the budgets.
        CheckpointChanged: (on entry, or while streaming) a file is no longer what it was.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        residency: Residency,
        *,
        passes: int,
        device: torch.device,
        device_ledger: ByteLedger,
        host_ledger: ByteLedger,
        overlapped: bool = True,
        sure: int | None = None,
        should_stop: Callable[[], None] = lambda: None,
    ) -> None:
        if len(layouts) != residency.n_blocks:
            raise UsageError(
                "every block needs a layout",
                expected=str(residency.n_blocks),
                found=str(len(layouts)),
            )
        build_schedule(residency, passes)  # an illegal number of passes dies here
        self.stats = StreamStats()
        self.notices: list[str] = []
        self._layouts, self._residency = tuple(layouts), residency
        self._computes: Iterator[Compute] = iter(())
        self._passes, self._overlapped = passes, overlapped
        self._visits = 0
        self._sure = _Sure(residency.n_blocks, passes if sure is None else sure)
        self._should_stop = should_stop
        self._device = DeviceTier(device, device_ledger)
        self._host = HostTier(host_ledger, device)
        self._mover: Mover | None = None
        self._loop: _Loop | None = None
        self._is_open = False
        self._pauses: frozenset[int] = frozenset()
        self._stack = ExitStack()

    @property
    def n_blocks(self) -> int:
        """Blocks of a pass."""
        return self._residency.n_blocks

    @contextmanager
    def prefetched(self) -> Iterator[None]:
        """Read ahead, as far as there is room in host memory, before the stream is entered (inside
        this context, or never).

        Raises:
            LedgerOverflow: the buffers in host memory do not fit the budget.
        """
        with ExitStack() as stack:
            self._open_host(stack)
            log.debug("prefetches for %d passes of %s", self._passes, self._residency)
            yield

    def __enter__(self) -> BlockStream:
        with ExitStack() as stack:
            if self._mover is None:
                self._open_host(stack)
            self._open_device(stack)
            self._stack = stack.pop_all()
        log.debug("open for %d passes of %s", self._passes, self._residency)
        return self

    def _open_host(self, stack: ExitStack) -> None:
        disk = DiskTier()
        stack.callback(disk.close)
        buffers = self._allocate_host(stack)
        places = self._residency
        # A jump leaves the other queues up to a pass behind.
        link = open_link(self._device.device, places.longest_wait + places.n_blocks)
        stack.callback(self._forget)
        carrier = Carrier(disk, link, self.stats)
        self._mover = Mover(self._layouts, places, buffers, carrier)
        loop = _Overlapped if self._overlapped else _Sequential
        self._loop = loop(self._mover, places, self._passes, self._sure)
        # Here as well as in `_open_device`: a prefetch may end without the stream being entered.
        stack.callback(self._loop.close)
        self._computes = _queue_of(places, self._passes, Compute)
        self._loop.begin(Queue.READ)

    def _allocate_host(self, stack: ExitStack) -> Buffers:
        places, host, asked = self._residency, self._host, self._residency.staging_buffers
        largest = max(self._sizes(places.through_staging), default=0)
        staging = stack.enter_context(host.ring("staging buffers", largest, asked))
        kept = self._sizes(places.host_resident)
        buffers = Buffers(
            kept=stack.enter_context(host.buffers("resident blocks", kept)), staging=staging
        )
        if len(staging) < asked:
            self._residency = replace(places, staging_buffers=len(staging))
            self.notices.append(
                f"the CUDA driver pins only {len(staging)} of {asked} buffers of "
                f"{format_bytes(largest)} in RAM: blocks are read less far ahead"
            )
        if host.pageable_bytes:
            self.notices.append(
                f"the CUDA driver does not pin {format_bytes(host.pageable_bytes)} of RAM: "
                "copies from there are slower"
            )
        self.stats.pageable_bytes = host.pageable_bytes
        return buffers

    def _open_device(self, stack: ExitStack) -> None:
        assert self._mover is not None and self._loop is not None
        places, device, mover = self._residency, self._device, self._mover
        resident, streamed = self._sizes(places.device_resident), self._sizes(places.streamed)
        slots = [max(streamed, default=0)] * places.device_slots
        buffers = mover.buffers
        buffers.resident = stack.enter_context(device.buffers("resident blocks", resident))
        buffers.slots = stack.enter_context(device.buffers("block slots", slots))
        # After the allocation: on CUDA the link begins behind whatever used that memory before.
        mover.link.begin()
        # Left in reverse: threads end, then both streams are drained, then the buffers that they
        # use go back to the ledger. Any other order frees memory that a copy still writes to.
        stack.callback(mover.link.drain)
        if resident and not places.staging_buffers:
            self._load_residents(buffers, max(resident))
        stack.callback(self._loop.close)
        self._loop.begin(Queue.COPY)
        self._is_open = True

    def _sizes(self, blocks: tuple[int, ...]) -> list[int]:
        return [self._layouts[block].nbytes for block in blocks]

    def _load_residents(self, buffers: Buffers, largest: int) -> None:
        assert self._mover is not None
        with ExitStack() as stack:
            disk = DiskTier()  # the other one may be reading ahead
            stack.callback(disk.close)
            through = stack.enter_context(self._host.staging(largest, STAGING_BYTES))
            carrier = Carrier(disk, self._mover.link, self.stats)
            blocks = self._residency.device_resident
            for block, target in zip(blocks, buffers.resident, strict=True):
                self._should_stop()
                carrier.load(self._layouts[block], through, target)

    def _forget(self) -> None:
        self._mover = self._loop = None

    def forward_pass(self) -> Iterator[tuple[int, Tensors]]:
        """Yield one pass over the blocks: each index with its tensors by local name.

        The body of the loop is the computation (on CUDA: issues it, on the current stream, which
        may be another one than before). The tensors are views of a buffer that is filled again
        afterwards.

        Raises:
            UsageError: the stream was opened for fewer passes, or the last one was not finished.
            CheckpointChanged, OSError, ...: whatever a thread ran into, as itself.
        """
        for index in range(self._residency.n_blocks):
            loop, mover = self._opened()
            self._visits += 1
            op = next(self._computes, None)
            if op is None or op.block != index:
                raise UsageError(
                    "the stream has no such pass",
                    expected=f"at most {self._passes} passes, each to its end",
                    found="one more" if op is None else f"a pass that was left at block {op.block}",
                )
            loop.bring(op)
            with mover.computing(op):
                yield index, mover.tensors(op)
            loop.leave(op)

    def expect(self, passes: int) -> None:
        """Make it sure that so many passes come, counted from the first.

        Fewer than were sure before are as many as before: they may have been fetched.
        """
        self._sure.raise_to(passes)

    def pause_after(self, blocks: Collection[int]) -> None:
        """From the next visit on, fetch ahead no further than the next of ``blocks``: what follows
        one of these is not known before it is asked for. None: as far as the rings allow."""
        self._pauses = frozenset(blocks)
        if not blocks:
            self._sure.set_to(self._passes * self.n_blocks)

    def _look_ahead(self, visit: int) -> None:
        """Prefetch for the visit so numbered, which comes next, and those up to the next pause
        after it."""
        if self._pauses:
            # Visits to the nearest pause, cyclically: blocks repeat every n_blocks visits.
            ahead = min((block - visit) % self.n_blocks for block in self._pauses)
            self._sure.set_to(visit + ahead + 1)

    def announce(self, block: int) -> None:
        """``block`` is visited next: said before the visit that is open ends, nothing more begins
        to move of those that will be left out."""
        loop, _ = self._opened()
        visit = self._visits + (block - self._visits) % self.n_blocks
        loop.announce(visit)
        self._look_ahead(visit)

    @contextmanager
    def visit(self, block: int) -> Iterator[Tensors]:
        """Provide the next visit of ``block``: its tensors by local name, until the context ends.

        Visits before it are left out: of these, what has not begun to move does not move, but for
        blocks that stay somewhere, which come whenever their turn is. `forward_pass` cannot go on
        from here unless the block was the last of a pass.

        Raises:
            UsageError: the stream was opened for fewer passes.
            CheckpointChanged, OSError, ...: whatever a thread ran into, as itself.
        """
        loop, mover = self._opened()
        left: list[Compute] = []
        for op in self._computes:
            self._visits += 1
            if op.block == block:
                break
            left.append(op)
        else:
            raise UsageError(
                "the stream has no such visit",
                expected=f"one of at most {self._passes} passes",
                found=f"one more of block {block}",
            )
        self._look_ahead(op.visit)
        if left:
            loop.leave_out(left)
        loop.bring(op)
        with mover.computing(op):
            yield mover.tensors(op)
        loop.leave(op)

    def _opened(self) -> tuple[_Loop, Mover]:
        if self._loop is None or self._mover is None or not self._is_open:
            raise UsageError("the stream is closed", remedy="Enter it with a with statement.")
        return self._loop, self._mover

    def close(self) -> None:
        """End the threads and give every byte back."""
        self._is_open = False
        self._stack.close()
        log.debug("closed: %s", self.stats)


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
        _load(layout, buffer, device, HostTier(host_ledger, device))
        yield layout.views(buffer)


def _load(layout: BlockLayout, buffer: Tensor, device: torch.device, host: HostTier) -> None:
    """Read, in a function of its own, so that no name holds the staging buffer after it."""
    with ExitStack() as loading:
        disk = DiskTier()
        loading.callback(disk.close)
        through = loading.enter_context(host.staging(layout.nbytes, STAGING_BYTES))
        link = open_link(device, 1)
        link.begin()
        Carrier(disk, link, StreamStats()).load(layout, through, buffer)


class _Loop(Protocol):
    """Makes sure that a block is there when it is computed with."""

    def begin(self, queue: Queue) -> None:
        """Let ``queue`` (read or copy) begin: the buffers that it fills are there."""

    def bring(self, op: Compute) -> None:
        """Return when the computation may be issued."""

    def announce(self, visit: int) -> None:
        """Visits from now to this one need not be brought."""

    def leave_out(self, ops: Sequence[Compute]) -> None:
        """Leave these out: they are not computed, and need not be brought."""

    def leave(self, op: Compute) -> None:
        """Leave a visit: its computation was issued, and its slot may be filled again behind it."""

    def close(self) -> None:
        """Stop, wherever it is."""


class _Sequential:
    """Reads, copies and computes one after another, in the schedule's own order."""

    def __init__(self, mover: Mover, residency: Residency, passes: int, sure: _Sure) -> None:
        self._mover, self._link = mover, mover.link
        self._ops = build_schedule(residency, passes)
        self._wanted = _Wanted(residency)

    def begin(self, queue: Queue) -> None:
        """Nothing is done ahead."""

    def bring(self, op: Compute) -> None:
        """Do everything that comes before ``op``."""
        with self._link.timed(Queue.COMPUTE, partial(self._mover.stats.add, "compute_wait_s")):
            for earlier in self._ops:
                if not isinstance(earlier, Compute):
                    self._mover.do(earlier, moves=self._wanted.moves(earlier))
                elif earlier.visit == op.visit:
                    break
                elif earlier.slot is not None:  # left out: a copy may wait for it
                    self._link.record(earlier.ref)
            for ref in op.after:
                self._link.wait(Queue.COMPUTE, ref)

    def announce(self, visit: int) -> None:
        """Nothing of those before it was begun."""
        self._wanted.since = visit

    def leave_out(self, ops: Sequence[Compute]) -> None:
        """As `announce` has it."""
        self.announce(ops[-1].visit + 1)

    def leave(self, op: Compute) -> None:
        """Mark its end, where a copy will wait for it."""
        if op.slot is not None:
            self._link.record(op.ref)

    def close(self) -> None:
        """Nothing runs."""


class _Overlapped:
    """A thread reads ahead and another copies ahead, as far as the rings allow."""

    def __init__(self, mover: Mover, residency: Residency, passes: int, sure: _Sure) -> None:
        self._mover, self._link, self._board = mover, mover.link, _Board()
        self._sure = sure
        self._wanted = _Wanted(residency)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="penstock-stream")
        self._ops: dict[Queue, Iterator[Read | Copy]] = {
            Queue.READ: _queue_of(residency, passes, Read),
            Queue.COPY: _queue_of(residency, passes, Copy),
        }

    def begin(self, queue: Queue) -> None:
        """Start the queue's thread."""
        thread = self._threads.submit(self._work, self._ops[queue])
        thread.add_done_callback(self._board.note_end)

    def _work(self, ops: Iterator[Read | Copy]) -> None:
        stats = self._mover.stats
        for op in ops:
            # Before the buffers, and not counted: waiting for a pass that may be skipped is no
            # stall.
            if not self._sure.wait(op.visit):
                return
            for ref in op.after:
                waited = self._board.wait(ref)
                if waited is None:
                    return
                stats.add(_WAITS[op.ref.queue, ref.queue], waited)
            if self._board.is_stopped:  # the first operations wait for nothing
                return
            self._mover.do(op, moves=self._wanted.moves(op))
            self._board.mark(op.ref)

    def bring(self, op: Compute) -> None:
        """Wait until the block's copy is issued, and let the computation follow it."""
        with self._link.timed(Queue.COMPUTE, partial(self._mover.stats.add, "compute_wait_s")):
            self._board.raise_failure()
            # First on the host, then on the device: an event can only be waited for once it is
            # recorded, and the copying thread records it when the copy is issued, not when it ends.
            for ref in op.after:
                self._board.wait(ref)
                self._board.raise_failure()
                self._link.wait(Queue.COMPUTE, ref)

    def announce(self, visit: int) -> None:
        """Let what is on its way arrive; nothing more sets out."""
        self._wanted.since = visit

    def leave_out(self, ops: Sequence[Compute]) -> None:
        """Leave what is not on its way where it is; the queues pass these visits as if done: in
        the stream of each an event stands for one, behind all that was issued there before.

        The other queues are waited for, so that none ever looks for an event that is forgotten.
        What they are at comes before the block that is wanted in any case."""
        self.announce(ops[-1].visit + 1)
        for op in ops:
            self.leave(op)
        copied = [ref for op in ops for ref in op.after]
        if copied:
            self._board.wait(copied[-1])

    def leave(self, op: Compute) -> None:
        """Mark its end, for the device and for the other threads, where a copy will wait for it."""
        if op.slot is not None:
            self._link.record(op.ref)
        self._board.mark(op.ref)

    def close(self) -> None:
        """Let the threads end after what they are at, and wait for them."""
        self._board.stop()
        self._sure.stop()
        self._threads.shutdown()


class _Wanted:
    """Which visits still need their block moved.

    Attributes:
        since: visits before this one do not. It only grows: what a read left out, the copy that
            comes after it leaves out too.
    """

    def __init__(self, residency: Residency) -> None:
        self._stays = {*residency.device_resident, *residency.host_resident}
        self.since = 0

    def moves(self, op: Read | Copy) -> bool:
        """Return whether ``op`` is done. What comes to stay comes once, and later visits count on
        it."""
        comes_to_stay = op.slot is None if isinstance(op, Copy) else op.block in self._stays
        return op.visit >= self.since or comes_to_stay


_WAITS = {
    (Queue.READ, Queue.COPY): "staging_wait_s",
    (Queue.COPY, Queue.READ): "disk_wait_s",
    (Queue.COPY, Queue.COMPUTE): "slot_wait_s",
}


class _Sure:
    """How many visits are sure to come: a skipped forward pass fetches nothing."""

    def __init__(self, n_blocks: int, passes: int) -> None:
        self._changed = threading.Condition()
        self._n_blocks, self._visits = n_blocks, passes * n_blocks
        self._is_stopped = False

    def raise_to(self, passes: int) -> None:
        """Make so many passes sure."""
        with self._changed:
            self._visits = max(self._visits, passes * self._n_blocks)
            self._changed.notify_all()

    def set_to(self, visits: int) -> None:
        """Make so many visits sure, be they fewer than before: what was begun is gone on with."""
        with self._changed:
            self._visits = visits
            self._changed.notify_all()

    def wait(self, visit: int) -> bool:
        """Return True when ``visit`` is sure, or False if everything was stopped instead."""
        # Read without the lock: the number is one int, and seldom falls. A stale one costs a wait,
        # or a fetch that was sure a moment ago.
        if visit < self._visits:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or visit < self._visits)
            return not self._is_stopped

    def stop(self) -> None:
        """Wake everybody up, to end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


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
            # One number a queue is enough: each issues its operations in the order of visits.
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
        """Note that a thread has ended; if by an exception, so does everything else."""
        if thread.exception() is not None:
            with self._changed:
                self._failure = self._failure or thread.exception()
            self.stop()

    def stop(self) -> None:
        """Wake everybody up, to end."""
        with self._changed:
            self.is_stopped = True
            self._changed.notify_all()


def _queue_of(residency: Residency, passes: int, kind: type[_Kind]) -> Iterator[_Kind]:
    return (op for op in build_schedule(residency, passes) if isinstance(op, kind))
