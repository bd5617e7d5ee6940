"""The plan of a job as a value: what lies where in each phase, and the bytes that follow from it.

Execution only obeys it; the report holds it beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Items = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StreamPlan:
    """Where the blocks of a network live during a phase.

    The residents are spread evenly between the streamed ones.

    Attributes:
        n_blocks: blocks of the network.
        device_resident: how many stay in VRAM for the whole phase.
        host_resident: how many stay in RAM and are copied at every visit.
        device_slots: ring of block buffers in VRAM.
        host_slabs: ring of block buffers in RAM that the disk is read into.
    """

    n_blocks: int
    device_resident: int = 0
    host_resident: int = 0
    device_slots: int = 0
    host_slabs: int = 0

    @property
    def disk_blocks(self) -> int:
        """Blocks read from disk at every pass."""
        return self.n_blocks - self.device_resident - self.host_resident


@dataclass(frozen=True)
class PhasePlan:
    """One phase: its streams, its numbers of chunks or tiles, its bytes by item, its seconds.

    Attributes:
        weights: ``(label, bytes)`` of the weights in VRAM.
        work: ``(label, bytes)`` of everything else in VRAM at the phase's peak.
        ram: ``(label, bytes)`` of everything in host memory at the phase's peak.
        chunk_tokens: tokens a chunk of the DiT forward.
        branches: CFG branches that go through a block during one visit.
        cross_kv_on_device: the cross-attention K/V of all blocks stay in VRAM (else in RAM).
        tiles: rows and columns of the VAE's tile grid.
        seconds: predicted duration.
        bound: what bounds it: "compute", "copy" or "read".
    """

    name: str
    weights: Items
    work: Items
    ram: Items
    stream: StreamPlan | None = None
    chunk_tokens: int = 0
    branches: int = 0
    cross_kv_on_device: bool = False
    tiles: tuple[int, int] = (1, 1)
    seconds: float = 0.0
    bound: str = "compute"

    def passes(self, total_branches: int) -> list[range]:
        """The branches of a step, divided into the passes over the blocks that serve them."""
        starts = range(0, total_branches, self.branches)
        return [range(start, min(start + self.branches, total_branches)) for start in starts]

    @property
    def work_bytes(self) -> int:
        """VRAM that is not weights."""
        return sum(count for _, count in self.work)

    @property
    def vram_bytes(self) -> int:
        """Peak VRAM of the phase."""
        return sum(count for _, count in self.weights) + self.work_bytes

    @property
    def ram_bytes(self) -> int:
        """Peak host memory of the phase."""
        return sum(count for _, count in self.ram)


@dataclass(frozen=True)
class Plan:
    """The phases of a job, in order, and the budgets they were made for."""

    phases: tuple[PhasePlan, ...]
    vram_limit_bytes: int
    ram_limit_bytes: int

    def __getitem__(self, name: str) -> PhasePlan:
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak_vram_bytes(self) -> int:
        """Highest VRAM peak of all phases."""
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        """Highest host memory peak of all phases."""
        return max(phase.ram_bytes for phase in self.phases)

    def with_phases(self, changed: tuple[PhasePlan, ...]) -> Plan:
        """This plan with the phases of the same names replaced."""
        new = {phase.name: phase for phase in changed}
        return replace(self, phases=tuple(new.get(phase.name, phase) for phase in self.phases))

    @property
    def seconds(self) -> float:
        """Predicted duration of the job."""
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return asdict(self) | {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` gave ``value`` for.

        Raises:
            TypeError, ValueError, KeyError: ``value`` is no plan.
        """
        return cls(
            phases=tuple(_phase_from_json(phase) for phase in value["phases"]),
            vram_limit_bytes=int(value["vram_limit_bytes"]),
            ram_limit_bytes=int(value["ram_limit_bytes"]),
        )


def _phase_from_json(value: Mapping[str, Any]) -> PhasePlan:
    plain = dict(value)
    for name in ("weights", "work", "ram"):
        plain[name] = tuple((str(label), int(count)) for label, count in plain[name])
    rows, columns = plain["tiles"]
    plain["tiles"] = (int(rows), int(columns))
    if plain["stream"] is not None:
        plain["stream"] = StreamPlan(**{k: int(v) for k, v in plain["stream"].items()})
    known = {field.name for field in fields(PhasePlan)}
    return PhasePlan(**{name: plain[name] for name in plain if name in known})


def changes(old: Plan, new: Plan) -> tuple[tuple[str, ...], bool]:
    """What ``new`` does otherwise, in words, and whether its result is the same to the bit.

    Only the number of tokens in a chunk alters rounding: streaming and tiles are exact.
    """
    told: list[str] = []
    identical = True
    for before, after in zip(old.phases, new.phases, strict=True):
        identical &= before.chunk_tokens == after.chunk_tokens
        for what, then, now in _facts(before, after):
            if then != now:
                told.append(f"{now} {what} instead of {then}")
    return tuple(told) or ("smaller buffers",), identical


def _facts(before: PhasePlan, after: PhasePlan) -> list[tuple[str, object, object]]:
    told: list[tuple[str, object, object]] = [
        ("tokens a chunk", before.chunk_tokens, after.chunk_tokens),
        ("CFG branches a visit", before.branches, after.branches),
        ("tiles", "x".join(map(str, before.tiles)), "x".join(map(str, after.tiles))),
        ("as the place of cross-attention K/V", _place(before), _place(after)),
    ]
    if before.stream is not None and after.stream is not None:
        then, now = before.stream, after.stream
        told += [
            ("blocks resident in VRAM", then.device_resident, now.device_resident),
            ("blocks resident in RAM", then.host_resident, now.host_resident),
            ("block slots in VRAM", then.device_slots, now.device_slots),
            ("block slabs in RAM", then.host_slabs, now.host_slabs),
        ]
    return told


def _place(phase: PhasePlan) -> str:
    return "VRAM" if phase.cross_kv_on_device else "RAM"
