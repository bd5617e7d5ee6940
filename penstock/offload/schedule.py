"""What is read, copied and computed, in which order, and what waits for what: pure, as data.

A network's blocks are visited 0..n-1, again and again (a pass each). Visits are numbered through:
visit ``v`` is block ``v % n`` of pass ``v // n``. There are three queues (read, copy, compute);
each works through its operations in the order of visits, and an operation begins when those it
names in ``after`` are finished. How far a queue runs ahead follows from the rings alone: a staging
buffer or a slot is filled again as soon as its last reader is done, across the end of a pass too.

LRU would miss every time on such a pattern (the same blocks in the same order), so what stays
resident is fixed, and spread evenly between what streams. Residents come in the first pass, each
when it is its turn: the first computations need not wait for the last resident.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from penstock.errors import UsageError


class Queue(Enum):
    """The three resources that work at the same time."""

    READ = "read"
    COPY = "copy"
    COMPUTE = "compute"


class Ref(NamedTuple):
    """Names one operation: there is at most one a queue and visit."""

    queue: Queue
    visit: int


@dataclass(frozen=True)
class Read:
    """Read ``block`` from disk into ``buffer``, or to its place in host memory (None)."""

    visit: int
    block: int
    buffer: int | None
    after: tuple[Ref, ...]

    @property
    def ref(self) -> Ref:
        """This operation's name."""
        return Ref(Queue.READ, self.visit)


@dataclass(frozen=True)
class Copy:
    """Copy ``block`` from ``buffer``, or from its place in host memory (None), into ``slot``, or to
    its place on the device (None)."""

    visit: int
    block: int
    buffer: int | None
    slot: int | None
    after: tuple[Ref, ...]

    @property
    def ref(self) -> Ref:
        """This operation's name."""
        return Ref(Queue.COPY, self.visit)


@dataclass(frozen=True)
class Compute:
    """Compute with ``block`` in ``slot``, or in its place on the device (None)."""

    visit: int
    block: int
    slot: int | None
    after: tuple[Ref, ...]

    @property
    def ref(self) -> Ref:
        """This operation's name."""
        return Ref(Queue.COMPUTE, self.visit)


Op = Read | Copy | Compute


@dataclass(frozen=True)
class Residency:
    """Which blocks stay where, and how many buffers the others pass through.

    Attributes:
        n_blocks: blocks of the network, 1 or more.
        device_resident: blocks that stay on the device, ascending.
        host_resident: blocks that stay in host memory and are copied at every visit, ascending.
        device_slots: ring of buffers on the device: 1 or more if any block is not device-resident;
            2 let a copy run beside the computation.
        staging_buffers: ring of buffers in host memory: 1 or more if any block is in neither set.
            With none, what stays on the device must be there before the first pass.

    Raises:
        UsageError: the sets overlap or name blocks that are not there, or a ring is missing.
    """

    n_blocks: int
    device_resident: tuple[int, ...] = ()
    host_resident: tuple[int, ...] = ()
    device_slots: int = 0
    staging_buffers: int = 0

    def __post_init__(self) -> None:
        _require(self.n_blocks >= 1, "a network has blocks", "1 or more", self.n_blocks)
        for blocks in (self.device_resident, self.host_resident):
            legal = list(blocks) == sorted(set(blocks) & set(range(self.n_blocks)))
            _require(legal, "residents", f"ascending blocks below {self.n_blocks}", blocks)
        both = sorted(set(self.device_resident) & set(self.host_resident))
        _require(not both, "residents", "each block in one memory", both)
        need_slots, need_staging = int(bool(self.streamed)), int(bool(self.disk_blocks))
        _require(self.device_slots >= need_slots, "slots", f">= {need_slots}", self.device_slots)
        _require(
            self.staging_buffers >= need_staging,
            "staging buffers",
            f">= {need_staging}",
            self.staging_buffers,
        )

    @property
    def streamed(self) -> tuple[int, ...]:
        """Blocks that pass through device slots."""
        return _without(range(self.n_blocks), self.device_resident)

    @property
    def disk_blocks(self) -> tuple[int, ...]:
        """Blocks that are read from disk at every visit."""
        return _without(self.streamed, self.host_resident)

    @property
    def through_staging(self) -> tuple[int, ...]:
        """Blocks that pass through staging buffers, in the first pass at least."""
        return _without(range(self.n_blocks), self.host_resident) if self.staging_buffers else ()

    @property
    def longest_wait(self) -> int:
        """No operation waits for one that is more visits back than this."""
        return self.n_blocks * max(self.device_slots, self.staging_buffers, 1)


def _require(holds: bool, what: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(
            f"illegal residency: {what}",
            expected=expected,
            found=str(found),
            remedy="Let the planner choose, or correct the numbers.",
        )


def _without(blocks: tuple[int, ...] | range, taken: tuple[int, ...]) -> tuple[int, ...]:
    gone = set(taken)
    return tuple(block for block in blocks if block not in gone)


def build_schedule(residency: Residency, passes: int) -> Iterator[Op]:
    """Build the operations of ``passes`` passes over all blocks, lazily.

    The order is a legal order of execution by itself: read, copy, compute, visit by visit. What an
    operation names is all that it waits for in the other queues; in its own, it waits its turn.

    Raises:
        UsageError: no pass.
    """
    _require(passes >= 1, "passes", "1 or more", passes)
    return _operations(residency, passes)


def _operations(residency: Residency, passes: int) -> Iterator[Op]:
    on_device, in_host = set(residency.device_resident), set(residency.host_resident)
    # Without staging buffers what stays on the device was brought before the first pass.
    arrived = set[int]() if residency.staging_buffers else set(on_device)
    staging = _Ring(residency.staging_buffers, Queue.COPY)
    slots = _Ring(residency.device_slots, Queue.COMPUTE)
    for visit in range(passes * residency.n_blocks):
        block = visit % residency.n_blocks
        buffer: int | None = None
        slot: int | None = None
        after: tuple[Ref, ...] = ()
        if block not in arrived:
            if block not in in_host:
                buffer, after = staging.take(visit)
            yield Read(visit, block, buffer, after)
            after = (Ref(Queue.READ, visit),)
        if block not in on_device:
            slot, free = slots.take(visit)
            after += free
        # A streamed block is copied at every visit; one that stays on the device once, into its own
        # place (no slot), as the first pass comes by.
        if slot is not None or block not in arrived:
            yield Copy(visit, block, buffer, slot, after)
            after = (Ref(Queue.COPY, visit),)
        yield Compute(visit, block, slot, after)
        # Only what stays has arrived for good: a streamed block is overwritten by the ring.
        if block in on_device or block in in_host:
            arrived.add(block)


class _Ring:
    """Buffers taken in turn, each free again after the ``reader`` operation of its last visit."""

    def __init__(self, size: int, reader: Queue) -> None:
        self._size, self._reader = size, reader
        self._visits: list[int] = []
        self._taken = 0

    def take(self, visit: int) -> tuple[int, tuple[Ref, ...]]:
        """Return the next buffer for ``visit``, and what it must wait for."""
        index = self._taken % self._size
        self._taken += 1
        if index == len(self._visits):
            self._visits.append(visit)
            return index, ()
        # The wait that makes reuse safe: a staging buffer is refilled after the copy out of it, a
        # slot after the computation with it. One wait a turn; all earlier readers came before.
        last, self._visits[index] = self._visits[index], visit
        return index, (Ref(self._reader, last),)
