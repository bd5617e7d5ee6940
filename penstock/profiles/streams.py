"""Where the blocks of a network live, in bytes and in seconds: every choice, and the best of them.

Seconds are those of `penstock.offload.simulated` in closed form: three queues that run beside each
other as far as the rings let them, so a pass takes as long as the busiest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.profiles.plan import Items, StreamPlan
from penstock.profiles.policy import Limits
from penstock.profiles.rates import Rates
from penstock.units import MIB

RING = (2, 3, 1)
"""Sizes of the device ring and of the host ring that are tried, the likeliest first."""

STAGING_BYTES = 64 * MIB
"""The most host memory through which weights that stay on the device are read."""

PAGE_BYTES = 4096
"""The least, and the unit of every buffer."""

LINK_CARE = 0.1
"""Where the disk is to be spared, a second in which a link is busy counts as this much waiting."""


@dataclass(frozen=True)
class Placement:
    """How many blocks stay where, and the bytes that follow.

    Attributes:
        device_bytes, host_bytes: of the residents.
        slot_bytes, slab_bytes: of the largest block that passes through each ring.
        copied_bytes, read_bytes: moved in one pass.
        through_bytes: the largest block that is only staged on its way to the device.
    """

    device_resident: int
    host_resident: int
    device_bytes: int
    host_bytes: int
    slot_bytes: int
    slab_bytes: int
    copied_bytes: int
    read_bytes: int
    through_bytes: int

    @property
    def least_staging_bytes(self) -> int:
        """The least host memory for loading residents."""
        return PAGE_BYTES if self.through_bytes else 0


@dataclass(frozen=True)
class Network:
    """All placements of a network's blocks, fewest residents first."""

    n_blocks: int
    choices: tuple[Placement, ...]

    @classmethod
    def of(cls, blocks: Sequence[int], *, resident: bool = True) -> Network:
        """Every number of residents in VRAM and in RAM; or none, for a network visited once."""
        n_blocks = len(blocks)
        most = n_blocks if resident else 0
        counts = ((d, h) for d in range(most + 1) for h in range(most - d + 1))
        return cls(
            n_blocks, tuple(_placement(blocks, StreamPlan(n_blocks, d, h)) for d, h in counts)
        )

    def rings(self, place: Placement) -> Iterator[tuple[int, int]]:
        """Slots and slabs that make sense for a placement: none where nothing passes."""
        streamed = self.n_blocks - place.device_resident
        from_disk = streamed - place.host_resident
        for slots in _ring(streamed):
            for slabs in _ring(from_disk):
                yield slots, slabs


def _ring(passing: int) -> tuple[int, ...]:
    return tuple(size for size in RING if size <= passing) or (0,)


def _placement(blocks: Sequence[int], counts: StreamPlan) -> Placement:
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
        slab_bytes=max(from_disk, default=0),
        copied_bytes=sum(streamed),
        read_bytes=sum(from_disk),
        through_bytes=0 if from_disk else max(device, default=0),
    )


@dataclass(frozen=True)
class Pace:
    """What a stream must keep up with.

    Attributes:
        compute_s: of one pass over all blocks.
        cycles: passes.
        care: weight of the links' busy seconds in the choice (see `LINK_CARE`).
    """

    compute_s: float
    cycles: int
    care: float = 0.0


class Timing(NamedTuple):
    """Seconds of opening and all passes; what the choice minimises; "compute", "copy" or "read"."""

    seconds: float
    objective: float
    bound: str


@dataclass(frozen=True)
class Stream:
    """A placement with its rings and what it costs."""

    placement: Placement
    n_blocks: int
    slots: int
    slabs: int
    timing: Timing

    @property
    def vram_bytes(self) -> int:
        """Of residents and slots."""
        return self.placement.device_bytes + self.slots * self.placement.slot_bytes

    @property
    def ram_bytes(self) -> int:
        """Of residents and slabs; with the least staging."""
        place = self.placement
        return place.host_bytes + self.slabs * place.slab_bytes + place.least_staging_bytes

    @property
    def pinned_bytes(self) -> int:
        """Page-locked while the stream is open."""
        return self.placement.host_bytes + self.slabs * self.placement.slab_bytes

    @property
    def key(self) -> tuple[float, int]:
        """Smaller is better: ties go to fewer bytes."""
        return self.timing.objective, self.vram_bytes + self.ram_bytes

    @property
    def plan(self) -> StreamPlan:
        """As the plan states it."""
        place = self.placement
        return StreamPlan(
            self.n_blocks, place.device_resident, place.host_resident, self.slots, self.slabs
        )

    @property
    def device_items(self) -> Items:
        """``(label, bytes)`` in VRAM."""
        return (
            ("resident blocks", self.placement.device_bytes),
            ("block slots", self.slots * self.placement.slot_bytes),
        )

    def host_items(self, room_bytes: int) -> Items:
        """``(label, bytes)`` in RAM; staging takes what ``room_bytes`` leaves it."""
        place = self.placement
        held = place.host_bytes + self.slabs * place.slab_bytes
        staged = staging_bytes(place.through_bytes, room_bytes - held)
        return (
            ("resident blocks", place.host_bytes),
            ("block slabs", self.slabs * place.slab_bytes),
            *((("staging", staged),) if place.through_bytes else ()),
        )


def staging_bytes(nbytes: int, room_bytes: int) -> int:
    """The buffer that `penstock.offload.tiers.HostTier.staging` takes to bring ``nbytes`` through
    when ``room_bytes`` are free."""
    return max(min(nbytes, STAGING_BYTES, room_bytes - room_bytes % PAGE_BYTES), PAGE_BYTES)


def best_stream(
    network: Network,
    pace: Pace,
    rates: Rates,
    room: Limits,
    *,
    from_disk: bool = True,
    better_than: float = float("inf"),
) -> Stream | None:
    """The best stream inside ``room``, or None.

    Args:
        from_disk: blocks may be read again at every pass.
        better_than: objectives above this need not be looked at.
    """
    best: Stream | None = None
    for place in network.choices:
        if place.read_bytes and not from_disk:
            continue
        for slots, slabs in network.rings(place):
            vram = place.device_bytes + slots * place.slot_bytes
            pinned = place.host_bytes + slabs * place.slab_bytes
            if not _fits(room, vram, pinned + place.least_staging_bytes, pinned):
                continue
            timing = _timing(place, network.n_blocks, slots, slabs, pace, rates)
            if timing.objective > better_than:
                continue
            found = Stream(place, network.n_blocks, slots, slabs, timing)
            if best is None or found.key < best.key:
                best, better_than = found, timing.objective
    return best


def stream_of(
    place: Placement, network: Network, slots: int, slabs: int, pace: Pace, rates: Rates
) -> Stream:
    """One stream with its seconds, whether it fits or not."""
    timing = _timing(place, network.n_blocks, slots, slabs, pace, rates)
    return Stream(place, network.n_blocks, slots, slabs, timing)


def all_streams(network: Network, pace: Pace, rates: Rates) -> Iterator[Stream]:
    """Every stream there is, whether it fits or not."""
    for place in network.choices:
        for slots, slabs in network.rings(place):
            yield stream_of(place, network, slots, slabs, pace, rates)


def _fits(room: Limits, vram: int, ram: int, pinned: int) -> bool:
    return (
        vram <= room.vram_bytes
        and ram <= room.ram_bytes
        and (room.pinned_bytes is None or pinned <= room.pinned_bytes)
        and (room.both_bytes is None or vram + ram <= room.both_bytes)
    )


def _timing(
    place: Placement, n_blocks: int, slots: int, slabs: int, pace: Pace, rates: Rates
) -> Timing:
    """A ring of one cannot be filled while it is read from: its two queues take turns."""
    copy_rate, read_rate = rates.copy_bytes_per_s, rates.read_bytes_per_s
    visit = pace.compute_s / n_blocks
    copy = place.copied_bytes / copy_rate
    read = place.read_bytes / read_rate
    bound = max((pace.compute_s, "compute"), (copy, "copy"), (read, "read"))[1]
    one_pass = max(
        pace.compute_s,
        copy + visit * (n_blocks - place.device_resident) if slots == 1 else copy,
        read + place.read_bytes / copy_rate if slabs == 1 else read,
    )
    opening = (place.device_bytes + place.host_bytes) / read_rate + place.device_bytes / copy_rate
    first_read, first_copy = place.slab_bytes / read_rate, place.slot_bytes / copy_rate
    ends = {
        "compute": first_read + first_copy,
        "copy": first_read + visit,
        "read": first_copy + visit,
    }[bound]
    seconds = opening + ends + pace.cycles * one_pass
    care = pace.care * pace.cycles * (copy + read)
    return Timing(seconds, seconds + care, bound)
