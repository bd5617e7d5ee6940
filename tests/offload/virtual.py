"""The streamer on a virtual device: every wait is seen by two checkers, and may be left out.

`Stage` runs one scenario. Streams of the device and threads of the host take turns as a policy says
(`tests.offload.turns`); each computation compares the bytes that it finds with those it should
find, and every access is reported to the race checker (`tests.offload.races`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda import _sanitizer

from penstock.offload import streamer, tiers
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Ref, Residency
from penstock.offload.streamer import BlockStream
from penstock.offload.tiers import CudaLink, DeviceTier, HostBuffer, HostTier
from tests.offload.blocks import Block, same
from tests.offload.races import NO_TRACES, RaceChecker
from tests.offload.turns import Policy, Stuck, TurnExecutor, Turns

CUDA = torch.device("cuda", 0)
POISON = 0xEE
Site = tuple[str, ...]


@dataclass(frozen=True)
class Mutant:
    """The ``number``-th wait of a site is left out (None: all of them)."""

    site: Site
    number: int | None = None


@dataclass(frozen=True)
class Scenario:
    """What is streamed, and what happens meanwhile.

    Attributes:
        leave_at: the visit at which the body raises; None: all passes are finished.
        fail_at: the piece that the disk cannot read; None: it reads all.
        ahead: the host's half opens first.
        small_pieces: a block is read in many pieces, several at a time.
        hops: every pass computes in a stream of its own.
        jumps: the blocks that are visited, in this order; None: all, pass by pass.
    """

    residency: Residency
    passes: int = 2
    overlapped: bool = True
    leave_at: int | None = None
    fail_at: int | None = None
    prefetched: bool = False
    small_pieces: bool = False
    hops: bool = False
    jumps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What the checkers found.

    Attributes:
        races: unordered accesses.
        wrong: visits that computed with wrong bytes.
        trouble: an exception that the scenario does not call for; "" if none.
        sites: how often each wait was come to.
        awaited: the records that somebody waited for.
    """

    races: list[str]
    wrong: list[int]
    trouble: str
    sites: Counter[Site]
    awaited: set[Mutant]

    @property
    def caught(self) -> bool:
        """Whether anything was wrong."""
        return bool(self.races or self.wrong or self.trouble)


class Left(Exception):
    """The body of the stream gives up."""


class Event:
    """A moment in a stream."""

    def __init__(self, stage: Stage, timing: bool) -> None:
        self._stage, self._timing = stage, timing
        self.stream: Stream | None = None
        self.named: Mutant | None = None
        self.is_done = False

    def record(self, stream: Stream) -> None:
        if self._timing:  # orders nothing
            self.stream = stream
            stream.items.append(self)
            return
        site = ("record", stream.name)
        if self._stage.drops(site):
            return
        self.stream, self.named = stream, Mutant(site, self._stage.sites[site])
        self._stage.turns.pause()
        self._stage.issue(stream)
        self._stage.races.record(self._stage.id_of(self), stream.name)
        stream.items.append(self)

    def synchronize(self) -> None:
        assert self.stream is None or self.stream.name == "stream copy"
        site = ("host waits for", "stream copy")
        if self._stage.drops(site):
            return
        self._stage.turns.pause(lambda: self.is_done or self.stream is None)
        self._stage.waits_for(self, self._stage.turns.me)

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, other: Event) -> float:
        assert self.is_done and other.is_done
        return 1.0


class Stream:
    """What was issued and is not done: work, events to be marked, events to wait for."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self.name = stage, name
        self.items: deque[Any] = deque()
        stage.turns.actors.append(self)

    def wait_event(self, event: Event) -> None:
        other = "nothing" if event.stream is None else event.stream.name
        site = (self.name, "waits for", other)
        if self._stage.drops(site):
            return
        self._stage.turns.pause()
        self._stage.waits_for(event, self.name)
        self.items.append(("wait", event))

    def wait_stream(self, other: Stream) -> None:
        site = (self.name, "begins after", other.name)
        if self._stage.drops(site):
            return
        event = Event(self._stage, timing=False)
        event.record(other)
        self._stage.waits_for(event, self.name)
        self.items.append(("wait", event))

    def synchronize(self) -> None:
        site = ("host drains", self.name)
        if self._stage.drops(site):
            return
        self._stage.turns.pause(lambda: not self.items)
        event = ("drained", self.name)
        self._stage.races.record(event, self.name)
        self._stage.races.wait(event, self._stage.turns.me)

    def push(self, work: Callable[[], None]) -> None:
        self._stage.turns.pause()
        self._stage.issue(self)
        self.items.append(work)

    def can_step(self) -> bool:
        if not self.items:
            return False
        head = self.items[0]
        return not isinstance(head, tuple) or head[1].is_done or head[1].stream is None

    def step(self) -> None:
        head = self.items.popleft()
        if isinstance(head, Event):
            head.is_done = True
        elif callable(head):
            head()


class VirtualFile:
    """A checkpoint in memory; every read is a turn of its own."""

    def __init__(self, stage: Stage, data: bytes) -> None:
        self._stage, self._data = stage, data

    def read_into(self, target: memoryview, offset: int, *, on_page: bool = False) -> int:
        stage = self._stage
        stage.pieces += 1
        failing = stage.pieces == stage.fail_at
        stage.turns.pause()
        if failing:
            raise OSError(5, "the disk is gone")
        stage.races.access(stage.turns.me, "disk read", reads=[stage.buffer_of(target)])
        target[:] = self._data[offset : offset + len(target)]
        return 0

    def check_unchanged(self) -> None:
        """It is."""


class Stage:
    """One run of the streamer on the virtual device."""

    def __init__(
        self, layouts: Sequence[BlockLayout], blocks: Sequence[Block], data: bytes, policy: Policy
    ) -> None:
        self._layouts, self._blocks, self._data = layouts, blocks, data
        self.turns, self.races = Turns(policy), RaceChecker()
        self.sites: Counter[Site] = Counter()
        self._mutant: Mutant | None = None
        self.awaited: set[Mutant] = set()
        self.wrong: list[int] = []
        self.pieces, self.fail_at = 0, None
        self.compute = Stream(self, "stream compute")
        self._tasks = 0
        self._events: list[Event] = []
        self._host_buffers: list[tuple[int, int]] = []

    # What stands in for torch.cuda, as far as the tiers use it.

    def current_stream(self, device: Any) -> Stream:
        return self.compute

    def Stream(self, device: Any) -> Stream:  # noqa: N802 - torch's name
        return Stream(self, "stream copy")

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:  # noqa: N802
        return Event(self, enable_timing)

    def id_of(self, event: Event) -> int:
        """Its own for ever: an address may come again."""
        self._events.append(event)
        return id(event)

    def waits_for(self, event: Event, by: str) -> None:
        """``by`` goes on after ``event``."""
        self.races.wait(self.id_of(event), by)
        if event.named is not None:
            self.awaited.add(event.named)

    # What the executor reports.

    def name_task(self, prefix: str, args: tuple[Any, ...]) -> str:
        self._tasks += 1
        return f"{prefix} {self._tasks}"

    def forks(self, name: str) -> Callable[[], None]:
        self.races.record(("fork", name), self.turns.me)
        return lambda: self.races.wait(("fork", name), name)

    def ends(self, future: Any, name: str) -> None:
        self.races.record(("end", id(future)), name)

    def joined(self, future: Any) -> None:
        self.races.wait(("end", id(future)), self.turns.me)

    def wait_for_all(self, futures: Iterable[Any]) -> None:
        if self.drops(("pieces", "are waited for")):
            return
        self.turns.pause(lambda: all(future.done() for future in futures))
        for future in futures:
            self.joined(future)

    # What the rest reports.

    def drops(self, site: Site) -> bool:
        """Count a wait; whether it is to be left out."""
        self.sites[site] += 1
        mutant = self._mutant
        if mutant is None or mutant.site != site:
            return False
        return mutant.number in (None, self.sites[site])

    def issue(self, stream: Stream) -> None:
        """What is issued comes after what its thread did before."""
        self.races.follow(self.turns.me, stream.name)

    def buffer_of(self, view: memoryview) -> Hashable:
        at = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        return next(begin for begin, end in self._host_buffers if begin <= at < end)

    def run(self, scenario: Scenario, mutant: Mutant | None = None) -> Outcome:
        """Stream as the scenario says, with one wait left out if a mutant says so."""
        self._mutant, self.fail_at = mutant, scenario.fail_at
        trouble = ""
        with pytest.MonkeyPatch.context() as patch:
            self._install(patch, scenario)
            try:
                self._stream(scenario)
                if scenario.leave_at is not None or scenario.fail_at is not None:
                    trouble = "nothing was raised"
            except Left:
                pass
            except Exception as error:  # noqa: BLE001 - whatever a mutant leads to
                if not (isinstance(error, OSError) and scenario.fail_at is not None):
                    trouble = f"{type(error).__name__}: {error}"
        if self.turns.stuck and not trouble:
            trouble = "stuck"
        return Outcome(self.races.races, self.wrong, trouble, self.sites, self.awaited)

    def _install(self, patch: pytest.MonkeyPatch, scenario: Scenario) -> None:
        patch.setattr(_sanitizer, "traceback", NO_TRACES)
        patch.setattr(tiers, "_cuda", self)
        patch.setattr(tiers, "PIECE_BYTES", 4096 if scenario.small_pieces else 1 << 20)
        patch.setattr(streamer, "STAGING_BYTES", 4096)
        patch.setattr(tiers, "wait", self.wait_for_all)
        patch.setattr(tiers.DiskTier, "_file", lambda tier, path, stamp: self.file)
        self.file = VirtualFile(self, self._data)
        for module in (tiers, streamer):
            patch.setattr(module, "ThreadPoolExecutor", self._executor)
        patch.setattr(streamer, "open_link", lambda device, longest: _Link(self, longest))
        patch.setattr(streamer, "_Board", lambda: _Board(self))
        patch.setattr(streamer, "HostTier", lambda ledger, device: _HostTier(self, ledger))
        patch.setattr(streamer, "DeviceTier", lambda device, ledger: _DeviceTier(self, ledger))
        patch.setattr(streamer.Carrier, "_read", _watched_read(self, streamer.Carrier._read))

    def _executor(self, most: int, thread_name_prefix: str) -> TurnExecutor:
        return TurnExecutor(self.turns, self, thread_name_prefix)

    def _stream(self, scenario: Scenario) -> None:
        residency = scenario.residency
        stream = BlockStream(
            self._layouts[: residency.n_blocks],
            residency,
            passes=scenario.passes,
            device=torch.device("cpu"),
            device_ledger=ByteLedger("VRAM", 1 << 30),
            host_ledger=ByteLedger("RAM", 1 << 30),
            overlapped=scenario.overlapped,
        )
        with ExitStack() as stack:
            if scenario.prefetched:
                stack.enter_context(stream.prefetched())
                self.turns.pause()
            stack.enter_context(stream)
            for visit, index in enumerate(scenario.jumps or ()):
                with stream.visit(index) as block:
                    self._compute(visit, index, block)
            visit = 0
            for number in range(scenario.passes if scenario.jumps is None else 0):
                if scenario.hops:
                    self.compute = Stream(self, f"stream compute {number}")
                for index, block in stream.forward_pass():
                    if visit == scenario.leave_at:
                        raise Left
                    self._compute(visit, index, block)
                    visit += 1

    def _compute(self, visit: int, index: int, block: dict[str, Tensor]) -> None:
        def check() -> None:
            if not same(block, self._blocks[index]):
                self.wrong.append(visit)

        at = min(tensor.data_ptr() for tensor in block.values())
        self.compute.push(check)
        self.races.access(self.compute.name, f"compute {visit}", reads=[("device", at)])

    # Buffers: who held them before, and what becomes of them.

    def took_device(self, buffers: Sequence[Tensor]) -> None:
        """torch hands out memory in which kernels of the current stream are still at work."""
        self.compute.push(lambda: [buffer.fill_(POISON) for buffer in buffers])
        ids = [("device", buffer.data_ptr()) for buffer in buffers]
        self.races.access(self.compute.name, "an earlier kernel", writes=ids)

    def gave_back(self, where: str, buffers: Sequence[Tensor]) -> None:
        """Others write there from now on."""
        ids = [(where, buffer.data_ptr()) for buffer in buffers]
        self.races.access(self.turns.me, f"reuse of {where} memory", writes=ids)
        for buffer in buffers:
            buffer.fill_(POISON)

    def took_host(self, buffers: Sequence[HostBuffer]) -> None:
        for buffer in buffers:
            begin = buffer.tensor.data_ptr()
            self._host_buffers.append((begin, begin + buffer.tensor.nbytes))


def _watched_read(stage: Stage, read: Callable[..., None]) -> Callable[..., None]:
    def watched(carrier: Any, layout: Any, target: HostBuffer, *more: Any) -> None:
        buffer = [target.tensor.data_ptr()]
        stage.turns.pause()
        stage.races.access(stage.turns.me, "a read begins", writes=buffer)
        read(carrier, layout, target, *more)
        stage.races.access(stage.turns.me, "a read has ended", writes=buffer)

    return watched


class _Link(CudaLink):
    """The CUDA link on the virtual device; its table of events is data, too."""

    def __init__(self, stage: Stage, longest_wait: int) -> None:
        super().__init__(CUDA, longest_wait)
        self._stage = stage

    def copy(self, target: Tensor, source: Tensor) -> None:
        stage, stream = self._stage, self._copy
        stream.push(lambda: target.copy_(source))
        stage.races.access(
            stream.name, "copy", [source.data_ptr()], [("device", target.data_ptr())]
        )

    def wait(self, queue: Any, ref: Ref) -> None:
        self._stage.turns.pause()
        self._stage.races.access(self._stage.turns.me, f"look up {ref}", reads=[ref])
        super().wait(queue, ref)

    def record(self, ref: Ref) -> None:
        super().record(ref)
        self._stage.races.access(self._stage.turns.me, f"note {ref}", writes=[ref])


class _Board(streamer._Board):
    """The streamer's board, whose waits are turns."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        self._marked: dict[Any, list[int]] = {}

    def mark(self, ref: Ref) -> None:
        stage = self._stage
        if stage.drops(("mark", ref.queue.value)):
            return
        self._marked.setdefault(ref.queue, []).append(ref.visit)
        stage.races.record(("mark", *ref), stage.turns.me)
        super().mark(ref)
        stage.turns.pause()

    def wait(self, ref: Ref) -> float | None:
        stage = self._stage
        site = (
            stage.turns.me.rpartition(" ")[0] or "main",
            "waits for the mark of",
            ref.queue.value,
        )
        if stage.drops(site):
            return 0.0
        stage.turns.pause(lambda: self.is_stopped or self._last[ref.queue] >= ref.visit)
        if self.is_stopped:
            return None
        seen = min(visit for visit in self._marked[ref.queue] if visit >= ref.visit)
        stage.races.wait(("mark", ref.queue, seen), stage.turns.me)
        return 0.0


class _HostTier(HostTier):
    """Host buffers whose lives are reported."""

    def __init__(self, stage: Stage, ledger: ByteLedger) -> None:
        super().__init__(ledger, torch.device("cpu"))
        self._stage = stage

    @contextmanager
    def buffers(self, label: str, sizes: Sequence[int]) -> Iterator[list[HostBuffer]]:
        with super().buffers(label, sizes) as made:
            self._stage.took_host(made)
            tensors = [buffer.tensor for buffer in made]
            try:
                yield made
            finally:
                ids = [tensor.data_ptr() for tensor in tensors]
                self._stage.races.access(self._stage.turns.me, "reuse of RAM", writes=ids)
                for tensor in tensors:
                    tensor.fill_(POISON)


class _DeviceTier(DeviceTier):
    """Device buffers whose lives are reported."""

    def __init__(self, stage: Stage, ledger: ByteLedger) -> None:
        super().__init__(torch.device("cpu"), ledger)
        self._stage = stage

    @contextmanager
    def buffers(self, label: str, sizes: Sequence[int]) -> Iterator[list[Tensor]]:
        with super().buffers(label, sizes) as made:
            held = list(made)
            self._stage.took_device(held)
            try:
                yield made
            finally:
                self._stage.gave_back("device", held)


__all__ = ["Mutant", "Outcome", "Scenario", "Stage", "Stuck"]
