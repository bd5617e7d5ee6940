"""A device with hard caps and a virtual clock: runs a schedule as numbers.

The same operations that the streamer executes are given seconds instead of bytes to move, so that
a plan's pace, its stalls and its cold start can be computed before anything is loaded. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from penstock.errors import UsageError
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Compute, Copy, Op, Queue, Ref, Residency, build_schedule


@dataclass(frozen=True)
class Machine:
    """What moves and holds bytes.

    Attributes:
        read_bytes_per_s: disk to host memory.
        copy_bytes_per_s: host memory to device.
        device_cap_bytes: room for residents and slots on the device.
        host_cap_bytes: room for residents and staging buffers in host memory.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    device_cap_bytes: int
    host_cap_bytes: int

    def __post_init__(self) -> None:
        if min(self.read_bytes_per_s, self.copy_bytes_per_s) <= 0:
            raise UsageError(
                "a machine that moves no bytes runs nothing",
                expected="positive rates",
                found=f"{self.read_bytes_per_s} and {self.copy_bytes_per_s} bytes a second",
            )


@dataclass(frozen=True)
class Block:
    """One block as numbers: its buffer, and the seconds of one visit to it."""

    nbytes: int
    compute_s: float


@dataclass(frozen=True)
class Span:
    """When an operation ran, in seconds from the start; ``idle_s``: its queue had waited for it."""

    op: Op
    start_s: float
    end_s: float
    idle_s: float


@dataclass(frozen=True)
class Timeline:
    """A schedule that was run.

    Attributes:
        spans: every operation, in the schedule's order.
        opening_s: loading what stays on the device, where no staging buffer is there for it, before
            the first operation.
        seconds: end of the last operation.
        device_bytes, host_bytes: what the buffers hold.
    """

    spans: tuple[Span, ...]
    opening_s: float
    seconds: float
    device_bytes: int
    host_bytes: int

    def busy_s(self, queue: Queue) -> float:
        """Seconds in which ``queue`` worked."""
        return sum(span.end_s - span.start_s for span in self.spans if span.op.ref.queue is queue)

    def stall_s(self, queue: Queue) -> float:
        """Seconds in which ``queue`` waited between its operations, or for its first one."""
        return sum(span.idle_s for span in self.spans if span.op.ref.queue is queue)


def simulate(
    residency: Residency, blocks: tuple[Block, ...], machine: Machine, passes: int
) -> Timeline:
    """Run ``passes`` passes: each queue in order, each operation as early as its ``after`` allows.

    Raises:
        LedgerOverflow: the buffers pass a cap of the machine.
        UsageError: not one block per block of the residency, or no pass.
    """
    if len(blocks) != residency.n_blocks:
        raise UsageError(
            "every block needs its numbers",
            expected=str(residency.n_blocks),
            found=str(len(blocks)),
        )
    device_bytes, host_bytes = _reserve(residency, blocks, machine)
    opening_s = _opening_s(residency, blocks, machine)
    free_at = dict.fromkeys(Queue, opening_s)
    ended: dict[Ref, float] = {}
    spans = []
    for op in build_schedule(residency, passes):
        queue = op.ref.queue
        start = max([free_at[queue], *(ended[ref] for ref in op.after)])
        end = start + _seconds(op, blocks[op.block], machine)
        spans.append(Span(op, start, end, start - free_at[queue]))
        ended[op.ref] = free_at[queue] = end
    return Timeline(tuple(spans), opening_s, max(free_at.values()), device_bytes, host_bytes)


def _seconds(op: Op, block: Block, machine: Machine) -> float:
    if isinstance(op, Compute):
        return block.compute_s
    rate = machine.copy_bytes_per_s if isinstance(op, Copy) else machine.read_bytes_per_s
    return block.nbytes / rate


def _reserve(residency: Residency, blocks: tuple[Block, ...], machine: Machine) -> tuple[int, int]:
    device = ByteLedger("VRAM", machine.device_cap_bytes)
    host = ByteLedger("RAM", machine.host_cap_bytes)
    for ledger, residents, ring, passing in (
        (device, residency.device_resident, residency.device_slots, residency.streamed),
        (host, residency.host_resident, residency.staging_buffers, residency.through_staging),
    ):
        ledger.reserve("resident blocks", sum(blocks[block].nbytes for block in residents))
        largest = max((blocks[block].nbytes for block in passing), default=0)
        ledger.reserve("ring", ring * largest)
    return device.used, host.used


def _opening_s(residency: Residency, blocks: tuple[Block, ...], machine: Machine) -> float:
    if residency.staging_buffers:
        return 0.0
    on_device = sum(blocks[block].nbytes for block in residency.device_resident)
    return on_device / machine.read_bytes_per_s + on_device / machine.copy_bytes_per_s


def least_seconds(
    residency: Residency, blocks: tuple[Block, ...], machine: Machine, passes: int
) -> float:
    """No schedule that visits the blocks in order takes less, whatever runs ahead of what.

    It is the bound max(read, copy, compute) with its cold start: the first pass brings the
    residents as well, nothing begins before the first block has come, and the last block is copied
    and computed with after it was read. A ring of one buffer has what fills it and what empties it
    take turns, so those two count as one resource.
    """
    loads = _loads(residency, blocks, machine, passes)
    found = [load.first_s + (passes - 1) * load.later_s + load.tail_s for load in loads]
    if passes > 1:
        last = _Last(residency, blocks, machine)
        found += [
            early.first_s + last.stages_s(early.end, late.end) + (passes - 1) * late.later_s
            for early in loads
            for late in loads
            if early.end <= late.begin
        ]
    return _opening_s(residency, blocks, machine) + max(found)


@dataclass(frozen=True)
class _Load:
    """What a resource has to do: ``begin`` and ``end`` are its stages (0 read, 1 copy, 2 compute).

    Attributes:
        first_s: the first pass, and what must come before it begins.
        later_s: every later pass.
        tail_s: what must come after its last operation.
    """

    begin: int
    end: int
    first_s: float
    later_s: float
    tail_s: float = 0.0


def _loads(
    residency: Residency, blocks: tuple[Block, ...], machine: Machine, passes: int
) -> list[_Load]:
    read, copy = 1 / machine.read_bytes_per_s, 1 / machine.copy_bytes_per_s
    disk, streamed = _nbytes(residency.disk_blocks, blocks), _nbytes(residency.streamed, blocks)
    kept = _nbytes(residency.host_resident, blocks)
    arriving = _nbytes(residency.device_resident, blocks) if residency.staging_buffers else 0
    compute = sum(block.compute_s for block in blocks)
    head = blocks[0].nbytes if _comes(0, residency) else 0
    loads = [
        _Load(0, 0, (disk + kept + arriving) * read, disk * read),
        _Load(1, 1, (streamed + arriving) * copy + head * read, streamed * copy),
        _Load(2, 2, compute + head * (read + copy), compute),
    ]
    if residency.staging_buffers == 1:
        loads.append(_Load(0, 1, (disk + arriving) * (read + copy), disk * (read + copy)))
    if residency.device_slots == 1:
        turns = streamed * copy + sum(blocks[block].compute_s for block in residency.streamed)
        loads.append(_Load(1, 2, turns, turns))
    read_last, copied_last = residency.disk_blocks, residency.streamed
    if passes == 1:  # the residents come in this pass too
        arrived = residency.device_resident if residency.staging_buffers else ()
        copied_last = tuple(sorted((*copied_last, *arrived)))
        read_last = tuple(sorted((*read_last, *residency.host_resident, *arrived)))
    tails = [_tail_s(read_last, blocks, copy), _tail_s(copied_last, blocks, 0)]
    tailed = zip(loads, tails, strict=False)
    return [replace(load, tail_s=tail) for load, tail in tailed] + loads[2:]


def _comes(block: int, residency: Residency) -> bool:
    """Whether ``block`` is read and copied in the first pass."""
    return bool(residency.staging_buffers) or block not in residency.device_resident


def _nbytes(which: tuple[int, ...], blocks: tuple[Block, ...]) -> int:
    return sum(blocks[block].nbytes for block in which)


def _tail_s(passing: tuple[int, ...], blocks: tuple[Block, ...], copy: float) -> float:
    """What comes after the last of ``passing`` in a pass: its next stage, and the computations."""
    if not passing:
        return 0.0
    last = passing[-1]
    return sum(block.compute_s for block in blocks[last:]) + blocks[last].nbytes * copy


@dataclass(frozen=True)
class _Last:
    """The last block of the first pass, on its way through the stages."""

    residency: Residency
    blocks: tuple[Block, ...]
    machine: Machine

    def stages_s(self, after: int, to: int) -> float:
        """Seconds of the stages behind ``after``, as far as ``to``."""
        block = self.blocks[-1]
        if not _comes(len(self.blocks) - 1, self.residency):
            return 0.0
        copy = block.nbytes / self.machine.copy_bytes_per_s if after < 1 <= to else 0.0
        return copy + (block.compute_s if after < 2 <= to else 0.0)
