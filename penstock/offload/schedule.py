"""Which block is where, and in which order things happen: a schedule as data.

Blocks are visited 0..N-1 again and again. Residents stay where they are; the others pass through
two rings of buffers, slabs in host memory and slots on the device. Every operation names the
operations it must come after; whoever keeps to that, in one thread or in three, computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.errors import UsageError


@dataclass(frozen=True)
class Residency:
    """Where the blocks of a network live.

    Attributes:
        device_resident: blocks that stay on the device.
        host_resident: blocks that stay in host memory.
        device_slots: buffers in the device's ring.
        host_slabs: buffers in the host's ring.

    Raises:
        UsageError: a block is in two places or nowhere, or a ring is missing.
    """

    n_blocks: int
    device_resident: tuple[int, ...] = ()
    host_resident: tuple[int, ...] = ()
    device_slots: int = 0
    host_slabs: int = 0

    def __post_init__(self) -> None:
        resident = self.device_resident + self.host_resident
        if len(set(resident)) != len(resident) or not set(resident) <= set(range(self.n_blocks)):
            raise UsageError(
                "a block cannot live in two places",
                expected=f"distinct blocks below {self.n_blocks}",
                found=str(resident),
            )
        streamed = self.n_blocks - len(self.device_resident)
        from_disk = streamed - len(self.host_resident)
        for what, count, needed in (
            ("device slots", self.device_slots, streamed),
            ("host slabs", self.host_slabs, from_disk),
        ):
            if count < min(1, needed):
                raise UsageError(
                    f"blocks stream, but there are no {what}",
                    expected="1 or more",
                    found=str(count),
                )


def spread(n: int, k: int) -> tuple[int, ...]:
    """``k`` of the numbers below ``n``, as evenly as can be, so that gaps between them are equal."""
    return tuple((2 * i + 1) * n // (2 * k) for i in range(k))


@dataclass(frozen=True)
class Read:
    """Read ``block`` from disk into ``slab``, after the copy of visit ``after_copy`` is complete."""

    visit: int
    block: int
    slab: int
    after_copy: int | None


@dataclass(frozen=True)
class Copy:
    """Copy ``block`` into ``slot``: from ``slab``, after this visit's read (or from the block's
    place in host memory, where ``slab`` is None), and after the compute of ``after_compute``."""

    visit: int
    block: int
    slab: int | None
    slot: int
    after_compute: int | None


@dataclass(frozen=True)
class Compute:
    """Compute with ``block`` in ``slot``, after this visit's copy (resident: ``slot`` is None)."""

    visit: int
    block: int
    slot: int | None


Op = Read | Copy | Compute


def build_schedule(residency: Residency, cycles: int) -> Iterator[Op]:
    """The operations of ``cycles`` passes over all blocks, in the sequential order.

    A visit is one block in one pass, numbered through all passes; it has at most one operation of
    each kind. Rings run on from the last block of a pass to the first of the next.
    """
    on_device, in_ram = set(residency.device_resident), set(residency.host_resident)
    slab_copy: list[int | None] = [None] * residency.host_slabs
    slot_compute: list[int | None] = [None] * residency.device_slots
    reads = copies = 0
    for visit in range(cycles * residency.n_blocks):
        block = visit % residency.n_blocks
        if block in on_device:
            yield Compute(visit, block, None)
            continue
        slab = None
        if block not in in_ram:
            slab = reads % residency.host_slabs
            reads += 1
            yield Read(visit, block, slab, slab_copy[slab])
            slab_copy[slab] = visit
        slot = copies % residency.device_slots
        copies += 1
        yield Copy(visit, block, slab, slot, slot_compute[slot])
        slot_compute[slot] = visit
        yield Compute(visit, block, slot)
