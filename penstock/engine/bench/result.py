"""What a benchmark has measured, as values: written to a file, read back with suspicion, and
compared."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from penstock.errors import UsageError
from penstock.regular import open_regular, read_regular

SCHEMA = "penstock bench 1"
LARGEST_BYTES = 16 << 20

LATER: Mapping[str, bool] = MappingProxyType({"later": True})
"""Metadata of a field that results of this schema had not from the first."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for: two results are comparable only where all of this is the same.

    Attributes:
        model: name, number of blocks and bytes of the transformer.
        weight_format: of its blocks.
        steps, warmup: denoising steps that count, and those before them that do not.
        branches: forward passes a step (2 with guidance).
        compute: the path of the blocks' matrices: "plain", "dequant", "fp8" or "int8"; and the
            attention, where it is not torch's own.
        vram, ram, profile: as asked; "" where nothing was said.
        chunk_tokens: of the plan: another cut computes otherwise.
        whole: every phase of a job, not denoising alone.
        rules: what else was asked of the plan, by the names of `penstock.profiles.options.Options`;
            results that were saved before there was any have none.
    """

    model: str
    weight_format: str
    width: int
    height: int
    frames: int
    steps: int
    warmup: int
    branches: int
    device: str
    compute: str
    profile: str
    vram: str
    ram: str
    chunk_tokens: int
    whole: bool
    overlapped: bool = True
    rules: dict[str, str] = field(default_factory=dict, metadata=LATER)

    @property
    def hash(self) -> str:
        """Sixteen hex digits that stand for all of it."""
        told = {name: value for name, value in asdict(self).items() if name != "rules" or value}
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ: here and there."""
        mine, others = asdict(self), asdict(other)
        return {name: (mine[name], others[name]) for name in mine if mine[name] != others[name]}


@dataclass(frozen=True)
class Links:
    """What the machine's links reach, measured in the same run.

    Attributes:
        read_bytes_per_s: direct reads of the model's own file, several in flight, nothing else
            going on.
        plain_read_bytes_per_s: the same, one read after the other.
        copy_bytes_per_s: pinned host memory to the device (plain copies on a CPU).
    """

    read_bytes_per_s: float
    plain_read_bytes_per_s: float
    copy_bytes_per_s: float


@dataclass(frozen=True)
class StepFigures:
    """One denoising step: seconds, bytes moved in it, and the computation's wait for weights."""

    seconds: float
    read_bytes: int
    copied_bytes: int
    stall_s: float

    @property
    def overlap(self) -> float:
        """Computing over wall time."""
        return 1 - min(self.stall_s, self.seconds) / self.seconds


@dataclass(frozen=True)
class PhaseFigures:
    """One phase, beside what its plan had promised.

    Attributes:
        bound: what the plan says it is bound by.
        read_s, copy_s: seconds in which disk and link were busy.
        waits_s: who waited for whom, by the names of `penstock.offload.mover.StreamStats`.
        ledger_vram_bytes, ledger_ram_bytes: peaks by the engine's own ledgers.
        process_bytes: how far the process's memory rose above where it was before the run.
        allocator_bytes: peak that torch's CUDA allocator held (0 on a CPU).
    """

    name: str
    seconds: float
    predicted_s: float
    bound: str
    read_bytes: int
    copied_bytes: int
    read_s: float
    copy_s: float
    stall_s: float
    waits_s: dict[str, float]
    predicted_vram_bytes: int
    ledger_vram_bytes: int
    predicted_ram_bytes: int
    ledger_ram_bytes: int
    process_bytes: int
    allocator_bytes: int

    @property
    def read_bytes_per_s(self) -> float:
        """While the disk was reading; 0 where it was not."""
        return self.read_bytes / self.read_s if self.read_s else 0.0

    @property
    def copied_bytes_per_s(self) -> float:
        """While the link was copying; 0 where it was not."""
        return self.copied_bytes / self.copy_s if self.copy_s else 0.0

    @property
    def overlap(self) -> float:
        """Computing over wall time."""
        return 1 - min(self.stall_s, self.seconds) / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class BenchResult:
    """One measurement.

    Attributes:
        machine: facts about it, by name.
        warmup: the steps that do not count.
        steps: those that do, in order.
        placement: how the plan laid the blocks out.
        latents_sha256: of the result: the same recipe on the same machine gives the same.
    """

    recipe: Recipe
    machine: dict[str, Any]
    links: Links
    warmup: tuple[StepFigures, ...]
    steps: tuple[StepFigures, ...]
    phases: tuple[PhaseFigures, ...]
    placement: dict[str, int]
    vram_limit_bytes: int
    ram_limit_bytes: int
    latents_sha256: str
    notices: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of the counted steps."""
        return tuple(step.seconds for step in self.steps)

    @property
    def median_s(self) -> float:
        """Of the counted steps."""
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> float:
        """Slowest less fastest counted step."""
        return max(self.seconds) - min(self.seconds)

    @property
    def overlap(self) -> float:
        """Computing over wall time, over all counted steps."""
        stalled = sum(min(step.stall_s, step.seconds) for step in self.steps)
        return 1 - stalled / sum(self.seconds)

    @property
    def peak_vram_bytes(self) -> int:
        """By the ledger, over all phases."""
        return max(phase.ledger_vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        """By the ledger, over all phases."""
        return max(phase.ledger_ram_bytes for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        derived = {
            "schema": SCHEMA,
            "recipe_hash": self.recipe.hash,
            "median_s": self.median_s,
            "spread_s": self.spread_s,
            "overlap": self.overlap,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
        }
        return derived | asdict(self)


def check_place(path: Path, begins: bytes | None = None) -> None:
    """Find out before measuring that ``path`` can be written, and is not somebody's file.

    Args:
        path: of a result, or of a picture.
        begins: the first bytes of what may be replaced there; None: a saved result.

    Raises:
        UsageError: it cannot, or it is.
    """
    try:
        if not path.exists():
            if path.is_symlink() or not path.parent.is_dir():
                raise UsageError(f"{path} cannot be written", expected="an existing folder")
            return
        if begins is None:
            load(path)
            return
        with open_regular(path) as file:
            ours = file.read(len(begins)) == begins
    except OSError as error:
        raise UsageError(f"{path} cannot be written", found=error.strerror) from error
    if not ours:
        raise UsageError(
            f"{path} is somebody's file",
            expected="a new name, or an earlier picture",
            remedy="Choose another name.",
        )


def save(result: BenchResult, path: Path) -> None:
    """Write a result.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written", found=error.strerror, remedy="Give another --save."
        ) from error


def load(path: Path) -> BenchResult:
    """Read a result that `save` wrote; every field is checked.

    Raises:
        UsageError: it cannot be read, or is something else; names the first field that is wrong.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise _foreign(path, f"{path.stat().st_size:,} bytes")
        value = json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _foreign(path, str(error) or type(error).__name__) from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise _foreign(path, repr(value.get("schema")) if isinstance(value, dict) else "no object")
    try:
        result: BenchResult = _checked(BenchResult, _renamed(value), "")
    except _Wrong as error:
        raise _foreign(path, str(error)) from error
    if not result.steps or not result.phases or min(result.seconds) <= 0:
        raise _foreign(path, "no counted steps or phases")
    if value.get("recipe_hash") != result.recipe.hash:
        raise _foreign(path, "a recipe that does not match its hash")
    return result


def _foreign(path: Path, found: str) -> UsageError:
    return UsageError(
        f"{path} is no saved benchmark",
        expected=f"a file that penstock bench --save wrote ({SCHEMA})",
        found=found[:200],
        remedy="Save one with this version of penstock.",
    )


def _renamed(value: Any) -> Any:
    """Return ``value`` with the names of today for what results of 0.1 call slabs."""
    if isinstance(value, list):
        return [_renamed(each) for each in value]
    if not isinstance(value, dict):
        return value
    names = {"host_slabs": "staging_buffers", "slab_wait_s": "staging_wait_s"}
    return {names.get(name, name): _renamed(each) for name, each in value.items()}


class _Wrong(Exception):
    """A field that is not what it should be."""


def _checked(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as a ``kind``: a dataclass here, a tuple, a dict, or a plain value."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _Wrong(f"{where} is no list")
        return tuple(_checked(get_args(kind)[0], each, f"{where}[]") for each in value)
    if get_origin(kind) is dict:
        return _checked_dict(kind, value, where)
    if hasattr(kind, "__dataclass_fields__"):
        return _checked_object(kind, value, where)
    return _checked_plain(kind, value, where)


def _checked_dict(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is no object")
    inner = get_args(kind)[1]
    if inner is Any:
        return dict(value)
    return {name: _checked(inner, each, f"{where}.{name}") for name, each in value.items()}


def _checked_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _Wrong(f"{where or 'it'} is no object")
    hints, made = get_type_hints(kind), {}
    for each in fields(kind):
        if each.name not in value and each.metadata.get("later"):
            continue
        if each.name not in value:
            raise _Wrong(f"{where}.{each.name} is missing".lstrip("."))
        made[each.name] = _checked(hints[each.name], value[each.name], f"{where}.{each.name}")
    return kind(**made)


def _checked_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float):
        value = float(value)
    if type(value) is not kind:
        raise _Wrong(f"{where.lstrip('.')} is {type(value).__name__}, not {kind.__name__}")
    if kind in (int, float) and not (math.isfinite(value) and value >= 0):
        raise _Wrong(f"{where.lstrip('.')} is {value}")
    return value


@dataclass(frozen=True)
class Thresholds:
    """When a difference counts: beyond both the share and the absolute amount.

    Attributes:
        percent: of the older value.
        seconds: of a step.
        nbytes: of a peak.
    """

    percent: float = 5.0
    seconds: float = 0.05
    nbytes: int = 32 << 20

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(
                    f"illegal threshold {each.name}", expected="0 or more", found=str(value)
                )

    def worse(self, old: float, new: float, absolute: float) -> bool:
        """Return whether ``new`` is worse than ``old`` (smaller is better)."""
        return new - old > absolute and new > old * (1 + self.percent / 100)


@dataclass(frozen=True)
class Verdict:
    """How a new result compares with an old one.

    Attributes:
        outcome: "PASS", "REGRESSION" or "RECIPE_MISMATCH".
        lines: what was compared, one a line.
    """

    outcome: str
    lines: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0, 1 for a regression, 2 where the two cannot be compared."""
        return {"PASS": 0, "REGRESSION": 1, "RECIPE_MISMATCH": 2}[self.outcome]


def compare(old: BenchResult, new: BenchResult, thresholds: Thresholds) -> Verdict:
    """Hold ``new`` against ``old``: seconds a step, and both peaks."""
    differences = old.recipe.differences(new.recipe)
    if differences:
        told = [f"{name}: {then!r} then, {now!r} now" for name, (then, now) in differences.items()]
        return Verdict("RECIPE_MISMATCH", tuple(told))
    compared: Mapping[str, tuple[float, float, float]] = {
        "seconds a step (median)": (old.median_s, new.median_s, thresholds.seconds),
        "peak VRAM in bytes": (old.peak_vram_bytes, new.peak_vram_bytes, thresholds.nbytes),
        "peak RAM in bytes": (old.peak_ram_bytes, new.peak_ram_bytes, thresholds.nbytes),
    }
    worse = [name for name, found in compared.items() if thresholds.worse(*found)]
    lines = [
        f"{'worse' if name in worse else 'fine'}: {name}: {then:,.4g} then, {now:,.4g} now "
        f"({_percent(then, now)})"
        for name, (then, now, _) in compared.items()
    ]
    lines += [
        f"note: {name} differs: {old.machine.get(name)!r} then, {new.machine.get(name)!r} now"
        for name in sorted(old.machine.keys() | new.machine.keys())
        if old.machine.get(name) != new.machine.get(name)
    ]
    return Verdict("REGRESSION" if worse else "PASS", tuple(lines))


def _percent(then: float, now: float) -> str:
    return f"{100 * (now - then) / then:+.1f} %" if then else "from nothing"
