"""Disk, host memory and device: what is allocated in each, and how bytes get from one to the next.

Bytes are reserved in a ledger before they are allocated. The device's queues (streams and events on
CUDA, nothing at all where the device is the CPU) stand behind the `Link` protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.blocks import PAGE_BYTES
from penstock.offload import depth
from penstock.offload.files import FileStamp, WeightFile
from penstock.offload.layout import BlockLayout, Extent, Inspector
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Queue, Ref
from penstock.units import MIB

PIECE_BYTES = 8 * MIB
"""One read request."""

_cuda: Any = torch.cuda  # untyped in torch


class BytesRead(NamedTuple):
    """Bytes that a read has moved, and how many of them directly."""

    nbytes: int
    direct_bytes: int


class DiskTier:
    """Reads blocks into host memory, in pieces, several in flight: directly where a block's place
    in its file and in the buffer allow it (whole pages), else through the page cache, which is told
    to forget what was read."""

    def __init__(self) -> None:
        self._files: dict[Path, WeightFile] = {}
        self._stack = ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        self._depth = depth.QueueDepth()

    def read(
        self,
        layout: BlockLayout,
        target: memoryview,
        start: int = 0,
        stop: int | None = None,
        inspector: Inspector | None = None,
    ) -> BytesRead:
        """Fill ``target`` (it begins on a page, as do ``start`` and `HostBuffer.view`) with bytes
        ``start`` to ``stop`` (default: the end) of the block.

        Not to be called from two threads at once.

        Args:
            inspector: is fed each piece while later ones are still being read.

        Raises:
            CheckpointChanged: a file is shorter or newer than when its header was read.
            CheckpointError: a file cannot be read.
        """
        stop = layout.nbytes if stop is None else stop
        pieces = [
            (self._file(piece.file, layout.stamps[piece.file]), piece)
            for extent in layout.extents
            for piece in _pieces(extent, start, stop)
        ]
        nbytes, began = sum(piece.nbytes for _, piece in pieces), time.perf_counter()
        direct_bytes = 0
        jobs = [_job(file, piece, target, start) for file, piece in pieces]
        with closing(self._run(jobs)) as counts:
            for (_, piece), count in zip(pieces, counts, strict=True):
                direct_bytes += count
                if inspector is not None:
                    inspector.feed(_part(target, piece, start), piece.buffer_offset)
        if len(pieces) >= 2 * self._depth.now:  # fewer pieces do not show what the depth is worth
            self._depth.note(nbytes, time.perf_counter() - began)
        # After the last byte: a change during the read would escape a check made before it.
        for file in {file for file, _ in pieces}:
            file.check_unchanged()
        return BytesRead(nbytes, direct_bytes)

    def _run(self, jobs: Sequence[Callable[[], int]]) -> Generator[int, None, None]:
        """Yield what each job gives, in order."""
        if len(jobs) <= 1:
            yield from (job() for job in jobs)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(depth.MOST, thread_name_prefix="penstock-disk")
            self._stack.callback(self._pool.shutdown)
        waiting = iter(jobs)
        flying = deque(self._pool.submit(job) for job in islice(waiting, self._depth.now))
        try:
            while flying:
                count = flying.popleft().result()
                # One in for one out keeps the depth, and results stay in the order of the buffer,
                # as the checksum that is fed with them needs.
                flying.extend(self._pool.submit(job) for job in islice(waiting, 1))
                yield count
        finally:
            # No piece may still be written to when an error lets the buffer go.
            wait(flying)

    def _file(self, path: Path, stamp: FileStamp | None) -> WeightFile:
        if path not in self._files:
            file = self._stack.enter_context(WeightFile(path, stamp, direct=True))
            self._files[path] = file
        return self._files[path]

    def close(self) -> None:
        """Close files and end threads."""
        self._files.clear()
        self._pool = None
        self._stack.close()


def _pieces(extent: Extent, start: int, stop: int) -> Iterator[Extent]:
    """Yield the part of ``extent`` that lies in ``start`` to ``stop`` of the buffer, in pieces."""
    first = max(extent.buffer_offset, start)
    last = min(extent.buffer_offset + extent.nbytes, stop)
    for position in range(first, last, PIECE_BYTES):
        file_offset = extent.file_offset + position - extent.buffer_offset
        yield Extent(extent.file, file_offset, min(PIECE_BYTES, last - position), position)


def _job(file: WeightFile, piece: Extent, target: memoryview, start: int) -> Callable[[], int]:
    """Return the read of ``piece`` into ``target``, which is on a page and at ``start`` of the
    block."""
    on_page = (piece.buffer_offset - start) % PAGE_BYTES == 0
    view = _part(target, piece, start)
    return partial(file.read_into, view, piece.file_offset, on_page=on_page)


def _part(target: memoryview, piece: Extent, start: int) -> memoryview:
    """Return where ``piece`` goes in a buffer that begins at ``start`` of the block."""
    position = piece.buffer_offset - start
    return target[position : position + piece.nbytes]


@dataclass(frozen=True)
class HostBuffer:
    """Page-aligned host memory: ``view`` for reads, ``tensor`` (uint8, 1-D) for copies."""

    view: memoryview
    tensor: Tensor
    is_pinned: bool


class HostTier:
    """Buffers in host memory, exactly as large as they say.

    torch's pinned allocator rounds up to powers of two; these are anonymous mappings, registered
    with the CUDA driver one by one. What it refuses stays pageable: copies from there go through a
    small staging buffer of the driver's own, and are slower.

    Args:
        ledger: of host memory; every buffer is reserved in it first.
        device: where the bytes go next.

    Attributes:
        pageable_bytes: buffers that the driver refused to pin.
    """

    def __init__(self, ledger: ByteLedger, device: torch.device) -> None:
        self._ledger, self._device = ledger, device
        self.pageable_bytes = 0

    @contextmanager
    def buffers(self, label: str, sizes: Sequence[int]) -> Iterator[list[HostBuffer]]:
        """Buffers of ``sizes`` bytes (multiples of the page size), until the context ends.

        Raises:
            LedgerOverflow: the budget does not hold them.
        """
        with self._ledger.reserve(label, sum(sizes)), ExitStack() as pins:
            made = [self._allocate(size, pins) for size in sizes]
            try:
                yield made
            finally:
                made.clear()

    @contextmanager
    def ring(self, label: str, nbytes: int, count: int) -> Iterator[list[HostBuffer]]:
        """Provide ``count`` buffers of one size; fewer, but one at least, where the driver pins
        only some: a smaller ring of pinned buffers is faster than copies from pageable memory.

        Raises:
            LedgerOverflow: the budget does not hold them.
        """
        made: list[HostBuffer] = []
        with ExitStack() as stack:
            for _ in range(count):
                with ExitStack() as one:
                    (buffer,) = one.enter_context(self.buffers(label, [nbytes]))
                    if made and made[0].is_pinned and not buffer.is_pinned:
                        self.pageable_bytes -= nbytes
                        del buffer  # its memory goes with its room
                        break
                    made.append(buffer)
                    stack.push(one.pop_all())
            try:
                yield made
            finally:
                made.clear()

    @contextmanager
    def staging(self, nbytes: int, most_bytes: int) -> Iterator[HostBuffer]:
        """Provide a buffer to bring ``nbytes`` through: at most ``most_bytes``, smaller where
        little is left of the budget, but a page at least.

        Raises:
            LedgerOverflow: not even a page is left.
        """
        room = self._ledger.free - self._ledger.free % PAGE_BYTES
        size = max(min(nbytes, most_bytes, room), PAGE_BYTES)
        with self.buffers("staging", [size]) as (buffer,):
            yield buffer

    def _allocate(self, nbytes: int, pins: ExitStack) -> HostBuffer:
        memory = _anonymous(max(nbytes, 1))
        with torch.inference_mode(False):
            tensor = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
        pinned = self._device.type == "cuda" and self._pin(tensor, pins)
        if self._device.type == "cuda" and not pinned:
            self.pageable_bytes += nbytes
        return HostBuffer(memoryview(memory)[:nbytes], tensor, pinned)

    def _pin(self, tensor: Tensor, pins: ExitStack) -> bool:
        runtime = _cuda.cudart()
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) != 0:
            _forget_cuda_error(self._device)
            return False
        pins.callback(runtime.cudaHostUnregister, tensor.data_ptr())
        return True


def _anonymous(nbytes: int) -> mmap.mmap:
    if os.name != "posix":
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer pages to pin and to hand to the disk; a kernel built without them says EINVAL.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _forget_cuda_error(device: torch.device) -> None:
    """Clear the error that a refused registration leaves: it stays the runtime's last error, and
    the next kernel launch, which did nothing wrong, would report it: let one that does not matter
    take it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


class DeviceTier:
    """Flat buffers on the device.

    Args:
        device: where.
        ledger: of its memory; every buffer is reserved in it first.
    """

    def __init__(self, device: torch.device, ledger: ByteLedger) -> None:
        self.device, self._ledger = device, ledger

    @contextmanager
    def buffers(self, label: str, sizes: Sequence[int]) -> Iterator[list[Tensor]]:
        """Buffers of ``sizes`` bytes (multiples of the page size; uint8, 1-D), until the context
        ends. They are cut from one allocation: an allocator rounds up once, not every time.

        Raises:
            LedgerOverflow: the budget does not hold them.
        """
        with self._ledger.reserve(label, sum(sizes)):
            with torch.inference_mode(False):
                whole = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            ends = list(accumulate(sizes))
            made = [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            del whole
            try:
                yield made
            finally:
                made.clear()


class Link(Protocol):
    """How the read, copy and compute queues wait for each other on the device's side.

    The streamer calls ``wait`` for each operation that the next one comes after, starts that one,
    and calls ``record`` when it has been issued. An operation is only waited for after its
    ``record`` has returned; each queue has one thread.
    """

    def begin(self) -> None:
        """Note that the device's buffers are allocated: nothing touches them before what the
        compute queue was given until now is finished."""

    def wait(self, queue: Queue, ref: Ref) -> None:
        """Let ``queue`` go on only when ``ref`` is finished."""

    def record(self, ref: Ref) -> None:
        """Operation ``ref`` was issued last in its queue."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Issue a copy from host memory to the device in the copy queue."""

    def timed(self, queue: Queue, add: Callable[[float], None]) -> AbstractContextManager[None]:
        """Give ``add`` the seconds that ``queue`` takes for what is issued inside, once known."""

    def land(self) -> None:
        """Return when all copies that were issued have arrived."""

    def drain(self) -> None:
        """Return when all that was issued is finished."""


class CpuLink:
    """The device is host memory under a cap: what is issued is finished when the call returns."""

    def begin(self) -> None:
        """Nothing is outstanding."""

    def wait(self, queue: Queue, ref: Ref) -> None:
        """Nothing is outstanding."""

    def record(self, ref: Ref) -> None:
        """Nothing to mark."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy now."""
        target.copy_(source)

    @contextmanager
    def timed(self, queue: Queue, add: Callable[[float], None]) -> Iterator[None]:
        """By the clock of the calling thread."""
        started = time.perf_counter()
        try:
            yield
        finally:
            add(time.perf_counter() - started)

    def land(self) -> None:
        """They have."""

    def drain(self) -> None:
        """Nothing is outstanding."""


class CudaLink:
    """A copy stream beside the compute stream, with events both ways; the host waits only where a
    staging buffer is to be read into again (in the reading thread).

    Args:
        device: a CUDA device; the compute queue is its current stream, whichever that is.
        longest_wait: no operation waits for one that is more visits back.
    """

    def __init__(self, device: torch.device, longest_wait: int) -> None:
        self._device = device
        self._compute = _cuda.current_stream(device)
        self._copy = _cuda.Stream(device)
        self._longest_wait = longest_wait
        self._events: dict[Ref, Any] = {}
        self._recorded: dict[Queue, deque[Ref]] = {Queue.COPY: deque(), Queue.COMPUTE: deque()}
        self._spans: dict[Queue, deque[_Span]] = {Queue.COPY: deque(), Queue.COMPUTE: deque()}

    def begin(self) -> None:
        """Make the copy stream wait: torch may hand out memory where kernels are still at work."""
        self._copy.wait_stream(self._stream(Queue.COMPUTE))

    def wait(self, queue: Queue, ref: Ref) -> None:
        """Make the stream of ``queue`` wait; for reads, the calling thread. A read that is waited
        for is finished already: its thread recorded it at its end."""
        if ref.queue is Queue.READ:
            return
        event = self._events[ref]
        if queue is Queue.READ:
            event.synchronize()
        else:
            self._stream(queue).wait_event(event)

    def record(self, ref: Ref) -> None:
        """Record an event in the stream of the operation."""
        if ref.queue is Queue.READ:
            return
        # Blocking: the reading thread sleeps in `synchronize` instead of spinning on a core.
        event = _cuda.Event(blocking=True)
        event.record(self._stream(ref.queue))
        self._events[ref] = event
        self._recorded[ref.queue].append(ref)
        # Nothing waits further back than `longest_wait`; without this a long job would keep an
        # event for every visit.
        if ref.queue is Queue.COMPUTE:
            self._forget_before(ref.visit - self._longest_wait)

    def _forget_before(self, visit: int) -> None:
        for recorded in self._recorded.values():
            while recorded and recorded[0].visit < visit:
                del self._events[recorded.popleft()]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Issue a copy that the host does not wait for."""
        # This thread's device too: leaving the stream would make a context on the current one.
        with _cuda.device(self._copy.device), _cuda.stream(self._copy):
            target.copy_(source, non_blocking=True)

    @contextmanager
    def timed(self, queue: Queue, add: Callable[[float], None]) -> Iterator[None]:
        """By events in the queue's stream; ``add`` is called when the device has passed them."""
        spans, stream = self._spans[queue], self._stream(queue)
        # Settled while passing by, without waiting: asking for a time that is not over would
        # synchronise the host with the device at every block.
        while spans and spans[0].is_known():
            spans.popleft().settle()
        start = _cuda.Event(enable_timing=True)
        start.record(stream)
        yield
        stop = _cuda.Event(enable_timing=True)
        stop.record(stream)
        spans.append(_Span(start, stop, add))

    def land(self) -> None:
        """Wait for the copy stream."""
        self._copy.synchronize()

    def drain(self) -> None:
        """Wait for both streams, and settle what was timed."""
        self._compute.synchronize()
        self._copy.synchronize()
        for spans in self._spans.values():
            while spans:
                spans.popleft().settle()

    def _stream(self, queue: Queue) -> Any:
        """Return the stream of a queue; of the compute queue that which is current now (only its
        own thread asks). Where that is another one than before, it goes on behind it: the queue's
        order is that of both."""
        if queue is Queue.COPY:
            return self._copy
        current = _cuda.current_stream(self._device)
        if current != self._compute:
            current.wait_stream(self._compute)
            self._compute = current
        return self._compute


@dataclass(frozen=True)
class _Span:
    """Two events of a stream, and who wants to know the seconds between them."""

    start: Any
    stop: Any
    add: Callable[[float], None]

    def is_known(self) -> bool:
        return bool(self.stop.query())

    def settle(self) -> None:
        self.add(self.start.elapsed_time(self.stop) / 1000)


def open_link(device: torch.device, longest_wait: int) -> Link:
    """Open the link to ``device``."""
    return CudaLink(device, longest_wait) if device.type == "cuda" else CpuLink()


def release_cached(device: torch.device) -> None:
    """Give back to the driver and the system what their allocators hold but nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc; others give back by themselves, or never
            library.malloc_trim(0)
