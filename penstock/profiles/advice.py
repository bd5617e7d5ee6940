"""What would fit when something does not: the nearest profile, or the nearest smaller request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penstock.errors import OverBudget
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import Manifest, Workload
from penstock.profiles.plan import Origin, Plan
from penstock.profiles.planner import fits, plan
from penstock.profiles.policy import Limits
from penstock.profiles.profile import SHIPPED, Chosen, load
from penstock.units import format_bytes

Manifests = Callable[[str], Manifest]
"""The model in a weight format; a folder has one and gives it whatever is asked."""


def plan_chosen(manifests: Manifests, workload: Workload, chosen: Chosen) -> Plan:
    """Return the plan in the first of the chosen formats that fits.

    Raises:
        OverBudget: none does; the remedy names a profile or a request that would.
    """
    refused: list[OverBudget] = []
    tried: list[Manifest] = []
    for weight_format in chosen.formats:
        manifest = manifests(weight_format)
        if manifest in tried:
            continue
        tried.append(manifest)
        try:
            found = plan(
                manifest,
                workload,
                chosen.hardware,
                chosen.policy,
                pinned_bytes=chosen.pinned_bytes,
            )
        except OverBudget as error:
            refused.append(error)
            continue
        origins = _with_format(chosen.origins, found.weight_format)
        return replace(found, origins=origins, options=chosen.options)
    raise _advised(refused[-1], tried[-1], workload, chosen)


def _with_format(origins: tuple[Origin, ...], found: str) -> tuple[Origin, ...]:
    """Return the format that the plan has, in the place of those that might have been."""
    return tuple(
        replace(
            origin,
            value=found,
            source=origin.source if found in origin.value.split(", ") else "the model's files",
        )
        if origin.name == "format"
        else origin
        for origin in origins
    )


def _advised(
    error: OverBudget, manifest: Manifest, workload: Workload, chosen: Chosen
) -> OverBudget:
    nearest = _nearest_request(manifest, workload, chosen)
    smaller = None
    if nearest is not None:
        smaller = f"here, --size {nearest.width}x{nearest.height} --frames {nearest.frames}"
    advice = [
        text for text in (_nearest_profile(error, manifest, workload, chosen), smaller) if text
    ]
    if not advice:
        advice = ["no profile and no shorter or smaller video does"]
    return OverBudget(
        error.resource,
        error.need_bytes,
        error.limit_bytes,
        error.consumers,
        remedy="What fits: " + "; or ".join(advice) + ".",
        nearest=None if nearest is None else (nearest.width, nearest.height, nearest.frames),
    )


def _nearest_profile(
    error: OverBudget, manifest: Manifest, workload: Workload, chosen: Chosen
) -> str | None:
    """Return the smallest shipped profile with more VRAM in which it fits."""
    if error.resource != "VRAM":
        return None
    hardware = chosen.hardware
    for name in SHIPPED:
        profile = load(name)
        if profile.vram_bytes is None or profile.vram_bytes <= hardware.vram_bytes:
            continue
        roomy = replace(hardware, vram_bytes=profile.vram_bytes)
        limits = Limits(roomy.vram_bytes, roomy.ram_bytes, chosen.pinned_bytes)
        if fits(manifest, workload, roomy, chosen.policy, limits):
            return f"--profile {name} ({format_bytes(profile.vram_bytes)} of VRAM)"
    return None


def _nearest_request(manifest: Manifest, workload: Workload, chosen: Chosen) -> VideoShape | None:
    """Return the largest smaller video that fits these budgets."""
    hardware = chosen.hardware
    limits = Limits(hardware.vram_bytes, hardware.ram_bytes, chosen.pinned_bytes)
    for shape in manifest.smaller_shapes(workload.shape):
        if fits(manifest, replace(workload, shape=shape), hardware, chosen.policy, limits):
            return shape
    return None
