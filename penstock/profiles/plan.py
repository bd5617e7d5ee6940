"""The plan of a job as a value: what lies where in each phase, and the bytes that follow from it.

Execution only obeys it; the report holds it beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from penstock.blocks import spread
from penstock.profiles.options import Options
from penstock.units import format_bytes

Items = tuple[tuple[str, int], ...]

PREFETCHED = "blocks read ahead"
WEIGHTS_PREFETCHED = "VAE decoder read ahead"
NEXT_PREFETCHED = "next transformer's blocks read ahead"
"""The transformer's buffers in host memory, as an item of a phase before its own."""

COMPUTE_PATHS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "multiplied as they are",
        "dequant": "decoded before each product",
        "fp8": "8-bit products in fp8",
        "int8": "8-bit products in int8",
        "nvfp4": "4-bit products in nvfp4",
        "mxfp8": "8-bit products in mxfp8",
    }
)
"""What a plan's ``compute_path`` means, for people."""

RESIDUAL: Mapping[str, str] = MappingProxyType(
    {"bf16": "as it computes", "fp32": "in fp32, as the makers do"}
)
"""What a plan's ``residual`` means, for people."""


NUMERICS: Mapping[str, str | None] = MappingProxyType(
    {"weight_format": None, "compute": "exact", "attention": "sdpa", "step_cache": "off"}
)
"""Fields of a plan that determine a result; and what they were in jobs that do not name them."""


@dataclass(frozen=True)
class StreamPlan:
    """Where the blocks of a network live during a phase.

    The residents are spread evenly between the streamed ones.

    Attributes:
        n_blocks: blocks of the network.
        device_resident: how many stay in VRAM for the whole phase.
        host_resident: how many stay in RAM and are copied at every visit.
        device_slots: ring of block buffers in VRAM.
        staging_buffers: ring of block buffers in RAM that the disk is read into.
    """

    n_blocks: int
    device_resident: int = 0
    host_resident: int = 0
    device_slots: int = 0
    staging_buffers: int = 0

    @property
    def disk_blocks(self) -> int:
        """Blocks read from disk at every pass."""
        return self.n_blocks - self.device_resident - self.host_resident

    @property
    def device_blocks(self) -> tuple[int, ...]:
        """The blocks that stay in VRAM."""
        return spread(self.n_blocks, self.device_resident)

    @property
    def host_blocks(self) -> tuple[int, ...]:
        """The blocks that stay in RAM, spread between those that stream."""
        on_device = set(self.device_blocks)
        left = [block for block in range(self.n_blocks) if block not in on_device]
        return tuple(left[place] for place in spread(len(left), self.host_resident))


@dataclass(frozen=True)
class PhasePlan:
    """One phase: its streams, its numbers of chunks or tiles, its bytes by item, its seconds.

    Attributes:
        weights: ``(label, bytes)`` of the weights in VRAM.
        work: ``(label, bytes)`` of everything else in VRAM at the phase's peak.
        ram_weights: ``(label, bytes)`` of the weights in host memory.
        ram_work: ``(label, bytes)`` of everything else in host memory.
        chunk_tokens: tokens a chunk of the DiT forward.
        branches: CFG branches, of all windows, that go through a block during one visit.
        windows: that a step denoises, each with its branches.
        residual: what the DiT's hidden states are kept in: "bf16", the compute dtype, as all jobs
            did whose records do not say it; or "fp32".
        cross_kv_on_device: the cross-attention K/V of all blocks stay in VRAM (else in RAM).
        tiles: rows and columns of the VAE's tile grid.
        pinned_bytes: of ``ram_weights``, page-locked where the device is a GPU.
        forwards: steps that are computed, the fewest and the most; (0, 0) where there are none. The
            phase's bytes moved and seconds are those of the most.
        read_bytes: from disk, in the whole phase.
        copied_bytes: from host memory to the device, in the whole phase.
        seconds: predicted duration.
        bound: what bounds it: "compute", "copy" or "read".
        facts: how its model cuts it and what is kept where, in that model's words, for people.
    """

    name: str
    weights: Items
    work: Items
    ram_weights: Items
    ram_work: Items = ()
    stream: StreamPlan | None = None
    chunk_tokens: int = 0
    branches: int = 0
    windows: int = 1
    residual: str = "bf16"
    cross_kv_on_device: bool = False
    tiles: tuple[int, int] = (1, 1)
    pinned_bytes: int = 0
    forwards: tuple[int, int] = (0, 0)
    read_bytes: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0
    bound: str = "compute"
    facts: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [
            f"{self.name}: VRAM {format_bytes(self.vram_bytes)}, RAM {format_bytes(self.ram_bytes)}"
        ]
        if self.stream is not None:
            words.append(str(self.stream))
        if self.chunk_tokens:
            words.append(f"{self.chunk_tokens} tokens a chunk, {self.branches} branches a visit")
            words.append(f"hidden states in {self.residual}")
        if self.tiles != (1, 1):
            words.append("{}x{} tiles".format(*self.tiles))
        return ", ".join((*words, f"{self.seconds:.4g} s by {self.bound}"))

    def passes(self, total_branches: int) -> list[range]:
        """Return the branches of a step, window by window, divided into the passes over the blocks
        that serve them.

        Args:
            total_branches: of a window.
        """
        total = total_branches * self.windows
        starts = range(0, total, self.branches)
        return [range(start, min(start + self.branches, total)) for start in starts]

    @property
    def work_bytes(self) -> int:
        """VRAM that is not weights."""
        return sum(count for _, count in self.work)

    @property
    def vram_bytes(self) -> int:
        """Peak VRAM of the phase."""
        return sum(count for _, count in self.weights) + self.work_bytes

    @property
    def ram(self) -> Items:
        """``(label, bytes)`` of everything in host memory at the phase's peak."""
        return self.ram_weights + self.ram_work

    @property
    def prefetch_bytes(self) -> int:
        """Host memory into which the transformer's first blocks are read meanwhile."""
        return sum(count for label, count in self.ram_weights if label == PREFETCHED)

    @property
    def prefetched_weights_bytes(self) -> int:
        """Host memory into which the VAE decoder is read before its own phase."""
        return dict(self.ram_weights).get(WEIGHTS_PREFETCHED, 0)

    @property
    def prefetched_next_bytes(self) -> int:
        """Host memory into which the next transformer's blocks are read before its own phases."""
        return dict(self.ram_weights).get(NEXT_PREFETCHED, 0)

    @property
    def ram_work_bytes(self) -> int:
        """Host memory that is not weights."""
        return sum(count for _, count in self.ram_work)

    @property
    def ram_bytes(self) -> int:
        """Peak host memory of the phase."""
        return sum(count for _, count in self.ram)


@dataclass(frozen=True)
class Origin:
    """Where a value of the plan comes from: "flag", "profile 12gb", "measured", "default", ..."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Plan:
    """The phases of a job, in order, and the budgets they were made for.

    Attributes:
        phases: what happens, in order, with its bytes and seconds.
        vram_limit_bytes, ram_limit_bytes: the budgets.
        weight_format: of the transformer's blocks.
        compute: "exact" or "fast", as asked.
        compute_path: how most of the blocks' matrices multiply: "plain", "dequant" (decoded first),
            "fp8" or "int8".
        attention: what self-attention runs on, as `penstock.profiles.attending.Attending.of` reads
            it: "sdpa", or another where that is asked for and works.
        step_cache: of forward passes, as asked.
        machine: the hardware's name.
        origins: where budgets, rates and policy come from.
        options: as they were asked for.
    """

    phases: tuple[PhasePlan, ...]
    vram_limit_bytes: int
    ram_limit_bytes: int
    weight_format: str = "bf16"
    compute: str = "exact"
    compute_path: str = "plain"
    attention: str = "sdpa"
    step_cache: str = "off"
    machine: str = ""
    origins: tuple[Origin, ...] = ()
    options: Options = field(default_factory=Options)

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

    @property
    def denoising(self) -> tuple[PhasePlan, ...]:
        """The phases that compute steps: as many as transformers take turns."""
        return tuple(phase for phase in self.phases if phase.chunk_tokens)

    def with_phases(self, changed: tuple[PhasePlan, ...]) -> Plan:
        """Return this plan with the phases of the same names as those ``changed`` replaced by them.

        Raises:
            Nothing: other names are left out.
        """
        new = {phase.name: phase for phase in changed}
        return replace(self, phases=tuple(new.get(phase.name, phase) for phase in self.phases))

    @property
    def residual(self) -> str:
        """What the DiT's hidden states are kept in, in all its phases."""
        found = [phase.residual for phase in self.denoising]
        return "fp32" if found and set(found) == {"fp32"} else "bf16"

    @property
    def numerics(self) -> dict[str, str]:
        """What of the plan determines a result, but for the order of sums."""
        return {name: getattr(self, name) for name in NUMERICS}

    @property
    def seconds(self) -> float:
        """Predicted duration of the job."""
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps; `from_json` reads them again.

        Raises:
            Nothing.
        """
        return asdict(self) | {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_json` gave ``value`` for, also as ``penstock plan --json``
        prints it.

        Raises:
            TypeError, KeyError, UsageError: ``value`` is no plan.
        """
        derived = ("peak_vram_bytes", "peak_ram_bytes", "seconds", "timesteps", "alternatives")
        plain = {name: value[name] for name in value if name not in derived}
        plain["phases"] = tuple(_phase_from_json(phase) for phase in value["phases"])
        plain["origins"] = tuple(Origin(**origin) for origin in value["origins"])
        plain["options"] = Options.from_json(value.get("options", {}))
        return cls(**plain)


def _phase_from_json(value: Mapping[str, Any]) -> PhasePlan:
    plain = dict(value)
    for name in ("weights", "work", "ram_weights", "ram_work"):
        plain[name] = tuple((str(label), int(count)) for label, count in plain[name])
    plain["tiles"] = tuple(plain["tiles"])
    plain["facts"] = tuple(plain.get("facts", ()))
    plain["forwards"] = tuple(plain.get("forwards", (0, 0)))
    if plain["stream"] is not None:
        stream = dict(plain["stream"])
        if "host_slabs" in stream:  # as plans of jobs call it that 0.1 has kept
            stream["staging_buffers"] = stream.pop("host_slabs")
        plain["stream"] = StreamPlan(**stream)
    return PhasePlan(**plain)


def changes(old: Plan, new: Plan) -> tuple[tuple[str, ...], bool]:
    """Return what ``new`` does otherwise, in words, and whether its result is the same to the
    bit."""
    told: list[str] = []
    identical = True
    for before, after in zip(old.phases, new.phases, strict=True):
        identical &= same_rounding(before, after)
        pairs = zip(_told(before), _told(after), strict=True)
        told += [f"{now} instead of {then}" for then, now in pairs if then != now]
    return tuple(dict.fromkeys(told)), identical


def same_rounding(one: PhasePlan, other: PhasePlan) -> bool:
    """Return whether two plans of a phase give the same result to the bit.

    Where weights lie and how many branches share a visit changes nothing. Chunks and tiles are
    exact in real arithmetic, but a kernel may sum in another order for another shape.
    """
    return rounding(one) == rounding(other)


def rounding(phase: PhasePlan) -> dict[str, Any]:
    """Return what of a phase's plan alters rounding, as plain values."""
    return {
        "chunk_tokens": phase.chunk_tokens,
        "tiles": list(phase.tiles),
        "residual": phase.residual,
    }


def _told(phase: PhasePlan) -> list[str]:
    told = [
        f"{phase.chunk_tokens} tokens a chunk",
        f"{phase.branches} CFG branches a visit",
        f"{phase.windows} windows a step",
        f"hidden states in {phase.residual}",
        f"{phase.tiles[0]}x{phase.tiles[1]} tiles",
        f"cross-attention K/V in {'VRAM' if phase.cross_kv_on_device else 'RAM'}",
        f"{'the first' if phase.prefetch_bytes else 'no'} blocks read ahead",
        f"VAE decoder read {'ahead' if phase.prefetched_weights_bytes else 'when it is needed'}",
    ]
    if phase.stream is not None:
        told += [
            f"{phase.stream.device_resident} blocks resident in VRAM",
            f"{phase.stream.host_resident} in RAM",
            f"{phase.stream.device_slots} block slots in VRAM",
            f"{phase.stream.staging_buffers} staging buffers in RAM",
        ]
    return told
