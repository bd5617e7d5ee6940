"""Weights that come before their phase, where RAM has room: the transformer's first blocks while
text and image are encoded, the VAE decoder during the last step."""

from __future__ import annotations

from dataclasses import replace

from penstock.profiles.plan import AHEAD, DECODER_AHEAD, PhasePlan, Plan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import staging_bytes


def with_reading_ahead(plan: Plan, limits: Limits) -> Plan:
    """``plan`` with buffers in host memory open before their own phase, where all phases that they
    are open in have room for them beside their own bytes.

    The transformer's are all opened or none, from the first phase on from which every one has room.
    """
    return _with_decoder(_with_blocks(plan, limits), limits)


def without_reading_ahead(plan: Plan) -> Plan:
    """``plan`` as it was before `with_reading_ahead`."""
    pinned = plan["denoise"].pinned_bytes - plan["denoise"].decoder_ahead_bytes
    changed = [_narrower(phase, pinned) for phase in plan.phases if phase.ahead_bytes]
    if nbytes := plan["denoise"].decoder_ahead_bytes:
        changed.append(_without_decoder(plan["denoise"], nbytes))
        staging = (("weights staging", staging_bytes(nbytes, 2 * nbytes)),)
        changed.append(replace(_without_decoder(plan["decode"], nbytes), ram_weights=staging))
    return plan.with_phases(tuple(changed))


def _with_blocks(plan: Plan, limits: Limits) -> Plan:
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


def _with_decoder(plan: Plan, limits: Limits) -> Plan:
    """With the VAE decoder's weights in a buffer of their size, in place of the staging buffer."""
    denoise, decode = plan["denoise"], plan["decode"]
    nbytes = sum(count for _, count in decode.weights)
    held = ((DECODER_AHEAD, nbytes),)
    changed = (
        replace(
            denoise,
            ram_weights=denoise.ram_weights + held,
            pinned_bytes=denoise.pinned_bytes + nbytes,
        ),
        replace(decode, ram_weights=held, pinned_bytes=nbytes),
    )
    fits = nbytes and all(_fits(phase, limits) for phase in changed)
    return plan.with_phases(changed) if fits else plan


def _without_decoder(phase: PhasePlan, nbytes: int) -> PhasePlan:
    held = tuple(item for item in phase.ram_weights if item[0] != DECODER_AHEAD)
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes - nbytes)


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
