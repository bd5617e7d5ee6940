"""Where the blocks of a network live, in bytes and in seconds: every choice, and the best of them.

Three queues (disk, link, computation) run beside each other as far as the rings let them. The first
passes are followed operation by operation, as `benchmarks.simulated` follows all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from penstock.blocks import PAGE_BYTES, STAGING_BYTES
from penstock.profiles.plan import Items, StreamPlan
from penstock.profiles.policy import Limits
from penstock.profiles.rates import Rates

if TYPE_CHECKING:
    from penstock.profiles.stream_table import Table

RING = (2, 3, 1)
"""Sizes of the device ring and of the host ring that are tried, the likeliest first."""

_PASSES = 4
"""Passes that are followed operation by operation; by then they repeat."""

LINK_CARE = 0.1
"""Where the disk is to be spared, a second in which a link is busy counts as this much waiting."""


@dataclass(frozen=True)
class Placement:
    """How many blocks stay where, and the bytes that follow.

    Attributes:
        device_bytes, host_bytes: of the residents.
        slot_bytes, buffer_bytes: of the largest block that passes through each ring at every pass.
        copied_bytes, read_bytes: moved in every pass, after the first.
        through_bytes: the largest block that passes through host memory only once, through the ring
            or, where there is none, in pieces: it stays on the device.
    """

    device_resident: int
    host_resident: int
    device_bytes: int
    host_bytes: int
    slot_bytes: int
    buffer_bytes: int
    copied_bytes: int
    read_bytes: int
    through_bytes: int

    def ring_bytes(self, staging: int) -> int:
        """Count the bytes of ``staging`` buffers in host memory; with none, of the least staging
        buffer, if any."""
        if staging:
            return staging * max(self.buffer_bytes, self.through_bytes)
        return PAGE_BYTES if self.through_bytes else 0


@dataclass(frozen=True)
class Network:
    """All placements of a network's blocks, fewest residents first."""

    blocks: tuple[int, ...]
    choices: tuple[Placement, ...]

    @property
    def n_blocks(self) -> int:
        """How many."""
        return len(self.blocks)

    @staticmethod
    def of(blocks: Sequence[int], *, resident: bool = True) -> Network:
        """Return every number of residents in VRAM and in RAM; or none, for a network visited
        once."""
        return _network(tuple(blocks), resident)

    @property
    def smallest(self) -> Iterator[Placement]:
        """Placements among which are the smallest in each memory: nothing resident but one slot and
        one staging buffer, or nothing that streams from disk; others need a host memory in between
        only where blocks differ in size."""
        even = len({place.slot_bytes for place in self.choices if place.slot_bytes}) == 1
        for place in self.choices:
            lone = place.device_resident in (0, self.n_blocks) or not even
            if not place.read_bytes or (lone and not place.host_resident):
                yield place

    @cached_property
    def least_vram_bytes(self) -> int:
        """No placement takes less."""
        return min(place.device_bytes + place.slot_bytes for place in self.choices)

    def rings(self, place: Placement) -> Iterator[tuple[int, int]]:
        """Yield the slots and staging buffers that make sense for a placement: none where nothing
        passes; a ring, or pieces of a block (0), where blocks pass only once."""
        streamed = self.n_blocks - place.device_resident
        through_staging = self.n_blocks - place.host_resident
        staged = () if place.read_bytes or not through_staging else (0,)
        for slots in _ring(streamed):
            for staging in (*_ring(through_staging), *staged):
                yield slots, staging

    @cached_property
    def table(self) -> Table:
        """Of every stream there is; it is looked through again for each other choice."""
        from penstock.profiles.stream_table import Row, Table  # numpy, for searches alone

        rows = []
        for choice, place in enumerate(self.choices):
            for slots, staging in self.rings(place):
                stream = Stream(place, self.n_blocks, slots, staging, UNTIMED)
                rows.append(Row(
                    choice, slots, staging, place.device_resident, place.device_bytes,
                    place.host_bytes, place.copied_bytes, place.read_bytes, stream.vram_bytes,
                    stream.ram_bytes,
                ))  # fmt: skip
        return Table(self.blocks, rows)


@lru_cache(maxsize=8)
def _network(blocks: tuple[int, ...], resident: bool) -> Network:
    """Return the one value of a network: each workload, budget and rule it is planned for looks
    through the same thousands of placements."""
    n_blocks = len(blocks)
    most = n_blocks if resident else 0
    counts = ((d, h) for d in range(most + 1) for h in range(most - d + 1))
    return Network(blocks, tuple(_placement(blocks, StreamPlan(n_blocks, d, h)) for d, h in counts))


def _ring(passing: int) -> tuple[int, ...]:
    return tuple(size for size in RING if size <= passing) or (0,)


def _placement(blocks: Sequence[int], counts: StreamPlan) -> Placement:
    if len(set(blocks)) == 1:
        return _even_placement(blocks[0], counts)
    on_device, in_host = set(counts.device_blocks), set(counts.host_blocks)
    streamed = [count for block, count in enumerate(blocks) if block not in on_device]
    from_disk = [c for block, c in enumerate(blocks) if block not in on_device | in_host]
    device = [blocks[block] for block in on_device]
    return Placement(
        device_resident=counts.device_resident,
        host_resident=counts.host_resident,
        device_bytes=sum(device),
        host_bytes=sum(streamed) - sum(from_disk),
        slot_bytes=max(streamed, default=0),
        buffer_bytes=max(from_disk, default=0),
        copied_bytes=sum(streamed),
        read_bytes=sum(from_disk),
        through_bytes=max(device, default=0),
    )


def _even_placement(block: int, counts: StreamPlan) -> Placement:
    """Return the same where all blocks are of one size, which needs no looking at each."""
    on_device, in_host = counts.device_resident, counts.host_resident
    streamed, from_disk = counts.n_blocks - on_device, counts.disk_blocks
    return Placement(
        device_resident=on_device,
        host_resident=in_host,
        device_bytes=on_device * block,
        host_bytes=in_host * block,
        slot_bytes=block if streamed else 0,
        buffer_bytes=block if from_disk else 0,
        copied_bytes=streamed * block,
        read_bytes=from_disk * block,
        through_bytes=block if on_device else 0,
    )


@dataclass(frozen=True)
class Pace:
    """What a stream must keep up with.

    Attributes:
        compute_s: of one pass over all blocks.
        passes: passes.
        care: weight of the links' busy seconds in the choice (see `LINK_CARE`).
    """

    compute_s: float
    passes: int
    care: float = 0.0


class Timing(NamedTuple):
    """Seconds of opening and all passes; what the choice minimises; "compute", "copy" or "read"."""

    seconds: float
    objective: float
    bound: str


UNTIMED = Timing(0.0, 0.0, "compute")
"""Of a stream of which only the bytes are asked."""


@dataclass(frozen=True)
class Stream:
    """A placement with its rings and what it costs."""

    placement: Placement
    n_blocks: int
    slots: int
    staging: int
    timing: Timing

    @property
    def vram_bytes(self) -> int:
        """Of residents and slots."""
        return self.placement.device_bytes + self.slots * self.placement.slot_bytes

    @property
    def ram_bytes(self) -> int:
        """Of residents and staging buffers, or the least staging."""
        return self.placement.host_bytes + self.placement.ring_bytes(self.staging)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked while the stream is open."""
        place = self.placement
        return place.host_bytes + (place.ring_bytes(self.staging) if self.staging else 0)

    @property
    def key(self) -> tuple[float, int]:
        """Smaller is better: ties go to fewer bytes."""
        return self.timing.objective, self.vram_bytes + self.ram_bytes

    @property
    def plan(self) -> StreamPlan:
        """As the plan states it."""
        place = self.placement
        return StreamPlan(
            self.n_blocks, place.device_resident, place.host_resident, self.slots, self.staging
        )

    @property
    def device_items(self) -> Items:
        """``(label, bytes)`` in VRAM."""
        return (
            ("resident blocks", self.placement.device_bytes),
            ("block slots", self.slots * self.placement.slot_bytes),
        )

    def host_items(self, room_bytes: int) -> Items:
        """Return ``(label, bytes)`` in RAM; staging takes what is left of ``room_bytes``, to a
        limit."""
        place = self.placement
        kept = ("resident blocks", place.host_bytes)
        if self.staging or not place.through_bytes:
            return kept, ("staging buffers", place.ring_bytes(self.staging))
        return kept, ("staging", staging_bytes(place.through_bytes, room_bytes - place.host_bytes))


def least_streams(network: Network, *, from_disk: bool) -> Iterator[Stream]:
    """Yield streams among which are the smallest in each memory, untimed.

    Args:
        from_disk: blocks may be read again at every pass.
    """
    for place in network.smallest:
        if from_disk or not place.read_bytes:
            yield Stream(place, network.n_blocks, *min(network.rings(place)), UNTIMED)


def staging_bytes(nbytes: int, room_bytes: int) -> int:
    """Return the buffer that `penstock.offload.tiers.HostTier.staging` takes to bring ``nbytes``
    through when ``room_bytes`` are free."""
    return max(min(nbytes, STAGING_BYTES, room_bytes - room_bytes % PAGE_BYTES), PAGE_BYTES)


def best_stream(
    network: Network,
    pace: Pace,
    rates: Rates,
    room: Limits,
    *,
    from_disk: bool = True,
    most_copied: float = float("inf"),
    better_than: float = float("inf"),
) -> Stream | None:
    """Return the best stream inside ``room``, or None.

    Args:
        from_disk: blocks may be read again at every pass.
        most_copied: bytes of blocks, in all passes.
        better_than: objectives above this need not be looked at.
    """
    if room.vram_bytes < network.least_vram_bytes:
        return None
    table = network.table
    inside = table.inside(room)
    if not from_disk:
        inside &= table.read == 0
    inside &= pace.passes * table.copied + table.device <= most_copied
    streams = table.by_bound(inside, pace.passes, pace.compute_s, pace.care, rates, better_than)
    best: Stream | None = None
    # Bound before timing: the clocks below cost far more.
    for least, nbytes, choice, slots, staging in streams:
        if best is not None:
            objective, fewest = best.key
            # Sorted by the bound: nothing after this one can win.
            if least > objective:
                break
            if nbytes >= fewest and least > objective * (1 - 2 * table.rounding):
                continue  # a tie at best, but for rounding
        stream = stream_of(network.choices[choice], network, slots, staging, pace, rates)
        if best is None or stream.key < best.key:
            best = stream
    return best


def stream_of(
    place: Placement, network: Network, slots: int, staging: int, pace: Pace, rates: Rates
) -> Stream:
    """Return one stream with its seconds, whether it fits or not."""
    timing = _timing(place, network.blocks, slots, staging, pace, rates)
    return Stream(place, network.n_blocks, slots, staging, timing)


def all_streams(network: Network, pace: Pace, rates: Rates) -> Iterator[Stream]:
    """Yield every stream there is, whether it fits or not."""
    for place in network.choices:
        for slots, staging in network.rings(place):
            yield stream_of(place, network, slots, staging, pace, rates)


def _opening_s(place: Placement, staging: int, rates: Rates) -> float:
    """Return the seconds before the first pass: without staging buffers what stays on the device
    comes before the first pass."""
    if staging:
        return 0.0
    return place.device_bytes * (1 / rates.read_bytes_per_s + 1 / rates.copy_bytes_per_s)


def _care_s(place: Placement, pace: Pace, rates: Rates) -> float:
    copy = place.copied_bytes / rates.copy_bytes_per_s
    return pace.care * pace.passes * (copy + place.read_bytes / rates.read_bytes_per_s)


def _timing(
    place: Placement, blocks: Sequence[int], slots: int, staging: int, pace: Pace, rates: Rates
) -> Timing:
    """Return the stream's operations on three clocks: all of the first passes, then more of the
    last."""
    copy = place.copied_bytes / rates.copy_bytes_per_s
    read = place.read_bytes / rates.read_bytes_per_s
    bound = max((pace.compute_s, "compute"), (copy, "copy"), (read, "read"))[1]
    ends = _pass_ends(place, blocks, slots, staging, pace, rates)
    seconds = _opening_s(place, staging, rates) + ends[-1]
    # Passes repeat once the rings are full: the last one simulated stands for all that follow.
    if pace.passes > len(ends):
        seconds += (pace.passes - len(ends)) * (ends[-1] - ends[-2])
    return Timing(seconds, seconds + _care_s(place, pace, rates), bound)


def _pass_ends(
    place: Placement, blocks: Sequence[int], slots: int, staging: int, pace: Pace, rates: Rates
) -> list[float]:
    """Return when each of the first passes ends, by the rules of `penstock.offload.schedule`: a
    staging buffer is read into when its last copy is done, a slot is copied into when its last
    compute is."""
    n_blocks, visit = len(blocks), pace.compute_s / len(blocks)
    counts = StreamPlan(n_blocks, place.device_resident, place.host_resident)
    on_device, in_host = set(counts.device_blocks), set(counts.host_blocks)
    copy_s = [count / rates.copy_bytes_per_s for count in blocks]
    read_s = [count / rates.read_bytes_per_s for count in blocks]
    slot_free, staging_free = [0.0] * slots, [0.0] * staging
    arrived = set[int]() if staging else set(on_device)
    read = copied = computed = 0.0
    copies = reads = 0
    ends = []
    for _ in range(min(pace.passes, _PASSES)):
        for block in range(n_blocks):
            ready, stays, kept = 0.0, block in on_device, block in in_host
            if block not in arrived:
                buffer = None if kept else reads % staging
                free = 0.0 if buffer is None else staging_free[buffer]
                read = ready = max(read, free) + read_s[block]
                reads += not kept
            if not stays or block not in arrived:
                free = 0.0 if stays else slot_free[copies % slots]
                copied = ready = max(copied, free, ready) + copy_s[block]
                if block not in arrived and buffer is not None:
                    staging_free[buffer] = copied
            # Computing waits for its block alone; reads and copies run on beside it.
            computed = max(computed, ready) + visit
            if not stays:
                slot_free[copies % slots] = computed
                copies += 1
            if stays or kept:
                arrived.add(block)
        ends.append(computed)
    return ends
