"""A device with hard caps and a virtual clock: runs a schedule as numbers.

The same operations that the streamer executes are given seconds instead of bytes to move, so that
a plan's pace, its stalls and its cold start can be computed before anything is loaded. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import UsageError
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import (
    Compute,
    Copy,
    Op,
    Queue,
    Ref,
    Residency,
    build_schedule,
)


@dataclass(frozen=True)
class Machine:
    """What moves and holds bytes.

    Attributes:
        read_bytes_per_s: disk to host memory.
        copy_bytes_per_s: host memory to device.
        device_cap_bytes: room for residents and slots on the device.
        host_cap_bytes: room for residents and slabs in host memory.
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
        opening_s: loading the residents, before the first operation.
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
    residency: Residency, blocks: tuple[Block, ...], machine: Machine, cycles: int
) -> Timeline:
    """Run ``cycles`` passes: each queue in order, each operation as early as its ``after`` allows.

    Raises:
        LedgerOverflow: the buffers pass a cap of the machine.
        UsageError: not one block per block of the residency, or no cycle.
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
    for op in build_schedule(residency, cycles):
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
        (host, residency.host_resident, residency.host_slabs, residency.disk_blocks),
    ):
        ledger.reserve("resident blocks", sum(blocks[block].nbytes for block in residents))
        largest = max((blocks[block].nbytes for block in passing), default=0)
        ledger.reserve("ring", ring * largest)
    return device.used, host.used


def _opening_s(residency: Residency, blocks: tuple[Block, ...], machine: Machine) -> float:
    on_device = sum(blocks[block].nbytes for block in residency.device_resident)
    in_host = sum(blocks[block].nbytes for block in residency.host_resident)
    read_s = (on_device + in_host) / machine.read_bytes_per_s
    return read_s + on_device / machine.copy_bytes_per_s
