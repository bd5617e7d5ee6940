"""From a model, a workload and a machine to a plan: search what fits, take the fastest.

Pure functions. Each phase (`penstock.profiles.phases`, `penstock.profiles.denoising`) knows its
shapes; here they are put together under the budgets, or refused with the arithmetic.
"""

from __future__ import annotations

<<<<<<< HEAD
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
=======
from collections.abc import Iterator
from dataclasses import replace
>>>>>>> main

from penstock.errors import OverBudget
from penstock.profiles.denoising import Denoise
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import ModelManifest
from penstock.profiles.phases import (
    Case,
    Group,
    Mux,
    OnePass,
    Step,
    Tiled,
    Workload,
    both_bytes,
    group_fits,
    ram_bytes,
    vram_bytes,
)
<<<<<<< HEAD
from penstock.profiles.plan import Items, PhasePlan, Plan, StreamPlan, same_rounding
from penstock.profiles.tiling import TileGrid
from penstock.units import MIB, format_bytes
=======
from penstock.profiles.plan import Items, PhasePlan, Plan
from penstock.profiles.policy import Limits, Policy
from penstock.units import format_bytes
>>>>>>> main

__all__ = ["Workload", "minimum_vram_bytes", "plan", "smaller"]

SHRINK = 0.9
"""What of the memory that ran out a smaller plan may take: fewer attempts than block by block."""


<<<<<<< HEAD
@dataclass(frozen=True)
class Workload:
    """What is asked of the model: the video's shape, the steps, whether CFG is on, and whether the
    sampler's state is kept on the disk (a copy of it passes through host memory)."""

    shape: VideoShape
    steps: int
    guided: bool
    keeps: bool = False

    @property
    def branches(self) -> int:
        """Forward passes a step."""
        return 2 if self.guided else 1


Group = tuple[PhasePlan, ...]
"""Phases that are planned together, because what the first leaves behind lives on in the next."""


def plan(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Plan:
=======
def plan(
    manifest: ModelManifest,
    workload: Workload,
    hardware: Hardware,
    policy: Policy = Policy(),  # noqa: B008 (a frozen value)
    *,
    pinned_bytes: int | None = None,
) -> Plan:
>>>>>>> main
    """The fastest plan inside the budgets of ``hardware``.

    Args:
        policy: rules that narrow the search.
        pinned_bytes: the most page-locked memory; None: all of the RAM budget.

    Raises:
        OverBudget: none fits; names the phase's need, the limit and the largest consumer.
    """
    limits = Limits(hardware.vram_bytes, hardware.ram_bytes, pinned_bytes)
    phases: list[PhasePlan] = []
    for step in steps(manifest, workload, hardware, policy):
        found = step.best(limits)
        if found is None:
            raise refusal(step, limits)
        phases.extend(found)
    return Plan(
        tuple(phases),
        hardware.vram_bytes,
        hardware.ram_bytes,
        weight_format=manifest.transformer.storage.format,
        machine=hardware.name,
    )


def steps(
    manifest: ModelManifest, workload: Workload, hardware: Hardware, policy: Policy
) -> Iterator[Step]:
    """The groups of phases, in the order in which they run."""
    case = Case(manifest, workload, hardware.rates, policy, pins=hardware.device == "cuda")
    yield OnePass.text(case)
    if manifest.image is not None:
        yield OnePass.image(case, manifest.image)
    if manifest.transformer.in_channels > manifest.vae.z_dim:
        yield Tiled("encode", case)
    yield Denoise(case)
    yield Tiled("decode", case)
    yield Mux(case)


def minimum_vram_bytes(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> int:
    """The least VRAM that any plan needs inside the RAM budget of ``hardware``.

    Raises:
        OverBudget: no plan fits the RAM budget, whatever the VRAM.
    """
    unlimited = Limits(1 << 62, hardware.ram_bytes)
    need = 0
    for step in steps(manifest, workload, hardware, Policy()):
        small = [group for group in step.all_small(unlimited) if group_fits(group, unlimited)]
        if not small:
            raise refusal(step, unlimited)
        need = max(need, min(map(vram_bytes, small)))
    return need


<<<<<<< HEAD
SHRINK = 0.9
"""How much of the memory that ran out a smaller plan may take: few attempts lead far down."""


def smaller(
    manifest: ModelManifest, workload: Workload, hardware: Hardware, current: Plan, phase: str,
    resource: str,
) -> Plan | None:  # fmt: skip
    """``current`` with the group of ``phase`` replaced by one that takes less memory.

    Plans with the same chunk of tokens are preferred, as their results are the same to the bit:
    fewer residents, smaller rings, fewer branches a visit. Every call gives strictly less, so that
    repeated calls come to an end.

    Args:
        manifest, workload, hardware: as for `plan`; the budgets still hold.
        current: the plan under which memory ran out.
        phase: where it ran out.
        resource: what ran out: ``"VRAM"``, ``"RAM"`` or ``"memory"`` (both are one).

    Returns:
        The new plan, or None: nothing smaller exists.
    """
    names = ("context", "denoise") if phase in ("context", "denoise") else (phase,)
    held = tuple(current[name] for name in names)
    place = names.index(phase)
    bytes_now = _taken(held[place], resource)
    for exact in (True, False):
        for limit_bytes in (int(SHRINK * bytes_now), bytes_now - 1):
            found = [
                group
                for tight in _tighter(hardware, resource, limit_bytes)
                for group in _candidates(phase, manifest, workload, tight)
                if _taken(group[place], resource) <= limit_bytes
                and _vram_bytes(group) <= hardware.vram_bytes
                and _ram_bytes(group) <= hardware.ram_bytes
                and (not exact or all(map(same_rounding, group, held)))
            ]
            if found:
                return current.with_phases(min(found, key=_preference))
    return None


def _taken(phase: PhasePlan, resource: str) -> int:
    return {
        "VRAM": phase.vram_bytes,
        "RAM": phase.ram_bytes,
        "memory": phase.vram_bytes + phase.ram_bytes,
    }[resource]


def _tighter(hardware: Hardware, resource: str, limit_bytes: int) -> Iterator[Hardware]:
    """Smaller machines: plans made for them have fewer residents than this one has room for."""
    vram_bytes, ram_bytes = hardware.vram_bytes, hardware.ram_bytes
    budgets = {
        "VRAM": [(limit_bytes, ram_bytes)],
        "RAM": [(vram_bytes, limit_bytes)],
        "memory": [(limit_bytes // 2, limit_bytes // 2), (limit_bytes, 0), (0, 0)],
    }[resource]
    for vram, ram in budgets:
        yield replace(hardware, vram_bytes=min(vram, vram_bytes), ram_bytes=min(ram, ram_bytes))


def _candidates(
    phase: str, manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> list[Group]:
    return _with_carried(_bare(phase, manifest, workload, hardware), manifest, workload)


def _bare(
    phase: str, manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Iterator[Group]:
    if phase in ("context", "denoise"):
        return _denoise(manifest, workload, hardware)
    if phase == "image":
        assert manifest.image is not None
        return _image(manifest.image, hardware)
    if phase == "text":
        return _text(manifest, workload, hardware)
    make = {"encode": _encode, "decode": _decode}[phase]
    return make(manifest.vae, workload, hardware)


KEPT_TENSORS = 4
"""Of the latents' size in a state that is kept: the latents and, of UniPC's order 2, three more."""


def carried_bytes(manifest: ModelManifest, workload: Workload) -> int:
    """Host memory of what passes from phase to phase: states, pixels, condition, latents."""
    spec, itemsize = manifest.transformer, manifest.text.weights.itemsize
    states = workload.branches * transformer.TEXT_TOKENS * spec.text_dim * itemsize
    image = manifest.image
    if image is not None:
        states += image.tokens * image.hidden_size * image.weights.itemsize
        states += 3 * image.image_size**2 * transformer.FP32_BYTES
    frames, height, width = workload.shape.latent(manifest.vae)
    if workload.keeps:
        latents = manifest.vae.z_dim * frames * height * width * transformer.FP32_BYTES
        states += KEPT_TENSORS * latents
    return states + spec.in_channels * frames * height * width * transformer.FP32_BYTES


def _groups(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Iterator[list[Group]]:
    for groups in _bare_groups(manifest, workload, hardware):
        yield _with_carried(groups, manifest, workload)


def _with_carried(
    groups: Iterable[Group], manifest: ModelManifest, workload: Workload
) -> list[Group]:
    carried = ("carried between phases", carried_bytes(manifest, workload))
    return [tuple(replace(phase, ram=(*phase.ram, carried)) for phase in group) for group in groups]


def _bare_groups(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Iterator[list[Group]]:
    yield list(_text(manifest, workload, hardware))
    if manifest.image is not None:
        yield list(_image(manifest.image, hardware))
    if manifest.transformer.in_channels > manifest.vae.z_dim:
        yield list(_encode(manifest.vae, workload, hardware))
    yield list(_denoise(manifest, workload, hardware))
    yield list(_decode(manifest.vae, workload, hardware))


def _vram_bytes(group: Group) -> int:
    return max(phase.vram_bytes for phase in group)


def _ram_bytes(group: Group) -> int:
    return max(phase.ram_bytes for phase in group)


def _choose(candidates: list[Group], hardware: Hardware) -> Group:
    fits_ram = [c for c in candidates if _ram_bytes(c) <= hardware.ram_bytes]
    fits = [c for c in fits_ram if _vram_bytes(c) <= hardware.vram_bytes]
    if fits:
        return min(fits, key=_preference)
    if fits_ram:
        worst = max(min(fits_ram, key=_vram_bytes), key=lambda phase: phase.vram_bytes)
        raise _over("VRAM", worst.name, worst.weights + worst.work, hardware.vram_bytes)
    worst = max(min(candidates, key=_ram_bytes), key=lambda phase: phase.ram_bytes)
    raise _over("RAM", worst.name, worst.ram, hardware.ram_bytes)


def _preference(group: Group) -> tuple[float, int]:
    return sum(phase.seconds for phase in group), _vram_bytes(group) + _ram_bytes(group)
=======
def refusal(step: Step, limits: Limits) -> OverBudget:
    """Why nothing of ``step`` fits: the smallest shape, in the memory that is too small for it."""
    small = list(step.all_small(limits))
    in_ram = [group for group in small if group_fits(group, replace(limits, vram_bytes=1 << 62))]
    if in_ram:
        least = min(in_ram, key=lambda group: (vram_bytes(group), ram_bytes(group)))
        worst = max(least, key=lambda phase: phase.vram_bytes)
        return _over("VRAM", worst.name, worst.weights + worst.work, limits.vram_bytes)
    least = min(small, key=lambda group: (ram_bytes(group), vram_bytes(group)))
    worst = max(least, key=lambda phase: phase.ram_bytes)
    if worst.ram_bytes > limits.ram_bytes or limits.pinned_bytes is None:
        return _over("RAM", worst.name, worst.ram, limits.ram_bytes)
    return _over("pinned RAM", worst.name, worst.ram_weights, limits.pinned_bytes)
>>>>>>> main


def _over(resource: str, phase: str, items: Items, limit_bytes: int) -> OverBudget:
    need = sum(count for _, count in items)
    flag = {"VRAM": "--vram", "RAM": "--ram"}.get(resource, "a pinned share of")
    return OverBudget(
        resource,
        need,
        limit_bytes,
        [(f"{phase}: {label}", count) for label, count in items],
        remedy=f"Give {flag} {need} ({format_bytes(need)}) or more, "
        "or ask for a smaller or shorter video",
    )


def smaller(
    manifest: ModelManifest,
    workload: Workload,
    hardware: Hardware,
    current: Plan,
    phase: str,
    resource: str,
    policy: Policy = Policy(),  # noqa: B008 (a frozen value)
) -> Plan | None:
    """``current`` with the group of ``phase`` replaced by one that takes less memory.

    Plans with the same chunk of tokens are preferred, as their results are the same to the bit.
    Every call gives strictly less, so that repeated calls come to an end.

    Args:
        manifest, workload, hardware, policy: as for `plan`; the budgets still hold.
        current: the plan under which memory ran out.
        phase: where it ran out.
        resource: what ran out: ``"VRAM"``, ``"RAM"`` or ``"memory"`` (both are one).

    Returns:
        The new plan, or None: nothing smaller exists.
    """
    measure = {"VRAM": vram_bytes, "RAM": ram_bytes, "memory": both_bytes}[resource]
    names = ("context", "denoise") if phase in ("context", "denoise") else (phase,)
    held = tuple(current[name] for name in names)
    now = measure(held)
    same_chunk = replace(policy, chunk_tokens=held[-1].chunk_tokens or None)
    for rules in (same_chunk, policy):
        for limit_bytes in (int(SHRINK * now), now - 1):
            limits = _tightened(hardware, resource, limit_bytes)
            for step in steps(manifest, workload, hardware, rules):
                found = step.best(limits)
                if found and found[0].name == names[0] and measure(found) < now:
                    return current.with_phases(found)
    return None


def _tightened(hardware: Hardware, resource: str, limit_bytes: int) -> Limits:
    limits = Limits(hardware.vram_bytes, hardware.ram_bytes)
    if resource == "VRAM":
        return replace(limits, vram_bytes=min(limit_bytes, limits.vram_bytes))
    if resource == "RAM":
        return replace(limits, ram_bytes=min(limit_bytes, limits.ram_bytes))
    return replace(limits, both_bytes=limit_bytes)
