"""Blocks that come before their phase: while text and image are encoded, where RAM has room."""

from __future__ import annotations

from dataclasses import replace

from penstock.profiles.plan import AHEAD, PhasePlan, Plan
from penstock.profiles.policy import Limits


def with_reading_ahead(plan: Plan, limits: Limits) -> Plan:
    """``plan`` with the transformer's buffers in host memory open from an earlier phase on.

    They are all opened or none, and stay open until the transformer's own phase: from the first
    phase on from which every one has room for them beside its own bytes.
    """
    before = _before_denoise(plan)
    denoise = plan["denoise"]
    nbytes = sum(count for label, count in denoise.ram_weights if label != "staging")
    changed: list[PhasePlan] = []
    for phase in reversed(before):
        wider = _wider(phase, nbytes, denoise.pinned_bytes)
        if not nbytes or not _fits(wider, limits):
            break
        changed.append(wider)
    return plan.with_phases(tuple(changed))


def without_reading_ahead(plan: Plan) -> Plan:
    """``plan`` as it was before `with_reading_ahead`."""
    pinned = plan["denoise"].pinned_bytes
    changed = tuple(_narrower(phase, pinned) for phase in plan.phases if phase.ahead_bytes)
    return plan.with_phases(changed)


def _before_denoise(plan: Plan) -> list[PhasePlan]:
    names = [phase.name for phase in plan.phases]
    return list(plan.phases[: names.index("denoise")])


def _wider(phase: PhasePlan, nbytes: int, pinned: int) -> PhasePlan:
    held = (*phase.ram_weights, (AHEAD, nbytes))
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes + pinned)


def _narrower(phase: PhasePlan, pinned: int) -> PhasePlan:
    held = tuple(item for item in phase.ram_weights if item[0] != AHEAD)
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes - pinned)


def _fits(phase: PhasePlan, limits: Limits) -> bool:
    pinned, both = limits.pinned_bytes, limits.both_bytes
    return (
        phase.ram_bytes <= limits.ram_bytes
        and (pinned is None or phase.pinned_bytes <= pinned)
        and (both is None or phase.vram_bytes + phase.ram_bytes <= both)
    )
