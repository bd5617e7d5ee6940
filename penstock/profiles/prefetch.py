"""Weights that come before their phase, where RAM has room: the transformer's first blocks while
text and image are encoded, a second transformer's and then the VAE decoder during the last step of
what goes before."""

from __future__ import annotations

from dataclasses import replace

from penstock.profiles.manifest import Prefetch
from penstock.profiles.plan import (
    NEXT_PREFETCHED,
    PREFETCHED,
    WEIGHTS_PREFETCHED,
    PhasePlan,
    Plan,
)
from penstock.profiles.policy import Limits
from penstock.profiles.streams import staging_bytes


def with_prefetch(plan: Plan, what: Prefetch, limits: Limits) -> Plan:
    """Return ``plan`` with buffers in host memory open before their own phase, where all phases
    that they are open in have room for them beside their own bytes.

    The transformer's are all opened or none, from the first phase on from which every one has room.
    """
    what = _planned(plan, what)
    return _with_weights(_with_next(_with_blocks(plan, what, limits), what, limits), what, limits)


def without_prefetch(plan: Plan, what: Prefetch) -> Plan:
    """Return ``plan`` as it was before `with_prefetch`."""
    what = _planned(plan, what)
    plan = _without_next(plan, what)
    first, stream = plan[what.stream], plan[what.last_stream]
    pinned = first.pinned_bytes - first.prefetched_weights_bytes
    changed = [_narrower(phase, pinned) for phase in plan.phases if phase.prefetch_bytes]
    if nbytes := stream.prefetched_weights_bytes:
        changed.append(_without_weights(stream, nbytes))
        staging = (("weights staging", staging_bytes(nbytes, 2 * nbytes)),)
        weights = _without_weights(plan[what.weights], nbytes)
        changed.append(replace(weights, ram_weights=staging))
    return plan.with_phases(tuple(changed))


def _planned(plan: Plan, what: Prefetch) -> Prefetch:
    """Return ``what`` without a phase that ``plan`` has not: one of few steps needs one
    transformer."""
    there = what.then in [phase.name for phase in plan.phases]
    return what if there else replace(what, then="", then_of="")


def _with_next(plan: Plan, what: Prefetch, limits: Limits) -> Plan:
    """Return the plan with the host's half of the stream that goes on after ``what.stream`` open
    from its last step on, and in the phase between the two."""
    if not what.then:
        return plan
    stream, then = plan[what.stream], plan[what.then]
    nbytes = sum(count for label, count in then.ram_weights if label != "staging")
    changed = tuple(
        replace(
            phase,
            ram_weights=(*phase.ram_weights, (NEXT_PREFETCHED, nbytes)),
            pinned_bytes=phase.pinned_bytes + then.pinned_bytes,
        )
        for phase in (stream, *_between(plan, what))
    )
    fits = nbytes and all(_fits(phase, limits) for phase in changed)
    return plan.with_phases(changed) if fits else plan


def _without_next(plan: Plan, what: Prefetch) -> Plan:
    if not what.then or not plan[what.stream].prefetched_next_bytes:
        return plan
    pinned = plan[what.then].pinned_bytes - plan[what.then].prefetched_weights_bytes
    changed = tuple(
        replace(
            phase,
            ram_weights=tuple(i for i in phase.ram_weights if i[0] != NEXT_PREFETCHED),
            pinned_bytes=phase.pinned_bytes - pinned,
        )
        for phase in (plan[what.stream], *_between(plan, what))
    )
    return plan.with_phases(changed)


def _between(plan: Plan, what: Prefetch) -> tuple[PhasePlan, ...]:
    """Return the phases after ``what.stream`` and before ``what.then``."""
    names = [phase.name for phase in plan.phases]
    return plan.phases[names.index(what.stream) + 1 : names.index(what.then)]


def _with_blocks(plan: Plan, what: Prefetch, limits: Limits) -> Plan:
    before, stream = _before(plan, what.stream), plan[what.stream]
    nbytes = sum(count for label, count in stream.ram_weights if label != "staging")
    changed: list[PhasePlan] = []
    # Backwards from the stream's own phase: the buffers stay open from the first to the last, so
    # that a phase in which they do not fit ends the run of those before it.
    for phase in reversed(before):
        wider = _wider(phase, nbytes, stream.pinned_bytes)
        if not nbytes or not _fits(wider, limits):
            break
        changed.append(wider)
    return plan.with_phases(tuple(changed))


def _with_weights(plan: Plan, what: Prefetch, limits: Limits) -> Plan:
    """Return the plan with the later phase's weights in a buffer of their size, in place of the
    staging buffer."""
    if not what.weights:
        return plan
    stream, weights = plan[what.last_stream], plan[what.weights]
    nbytes = sum(count for _, count in weights.weights)
    held = ((WEIGHTS_PREFETCHED, nbytes),)
    changed = (
        replace(
            stream,
            ram_weights=stream.ram_weights + held,
            pinned_bytes=stream.pinned_bytes + nbytes,
        ),
        replace(weights, ram_weights=held, pinned_bytes=nbytes),
    )
    fits = nbytes and all(_fits(phase, limits) for phase in changed)
    return plan.with_phases(changed) if fits else plan


def _without_weights(phase: PhasePlan, nbytes: int) -> PhasePlan:
    held = tuple(item for item in phase.ram_weights if item[0] != WEIGHTS_PREFETCHED)
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes - nbytes)


def _before(plan: Plan, name: str) -> list[PhasePlan]:
    names = [phase.name for phase in plan.phases]
    return list(plan.phases[: names.index(name)])


def _wider(phase: PhasePlan, nbytes: int, pinned: int) -> PhasePlan:
    held = (*phase.ram_weights, (PREFETCHED, nbytes))
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes + pinned)


def _narrower(phase: PhasePlan, pinned: int) -> PhasePlan:
    held = tuple(item for item in phase.ram_weights if item[0] != PREFETCHED)
    return replace(phase, ram_weights=held, pinned_bytes=phase.pinned_bytes - pinned)


def _fits(phase: PhasePlan, limits: Limits) -> bool:
    pinned, both = limits.pinned_bytes, limits.both_bytes
    return (
        phase.ram_bytes <= limits.ram_bytes
        and (pinned is None or phase.pinned_bytes <= pinned)
        and (both is None or phase.vram_bytes + phase.ram_bytes <= both)
    )
