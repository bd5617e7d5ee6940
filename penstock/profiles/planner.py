"""From a model, a workload and a machine to a plan: search what fits, take the fastest.

Pure functions. Each phase (`penstock.profiles.phases`, and those of a family) knows its
shapes; here they are put together under the budgets, or refused with the arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from penstock.errors import OverBudget
from penstock.profiles.hardware import Hardware
from penstock.profiles.phases import (
    Case,
    Manifest,
    Mux,
    Step,
    Workload,
    both_bytes,
    compute_path,
    group_fits,
    ram_bytes,
    vram_bytes,
)
from penstock.profiles.plan import Items, PhasePlan, Plan
from penstock.profiles.policy import Limits, Policy, policy_of
from penstock.profiles.prefetch import with_prefetch, without_prefetch
from penstock.units import format_bytes

log = logging.getLogger(__name__)

__all__ = ["Workload", "fits", "minimum_vram_bytes", "plan", "smaller"]

SHRINK = 0.9
"""What of the memory that ran out a smaller plan may take: fewer attempts than block by block."""


def plan(
    manifest: Manifest,
    workload: Workload,
    hardware: Hardware,
    policy: Policy = Policy(),  # noqa: B008 (a frozen value)
    *,
    pinned_bytes: int | None = None,
) -> Plan:
    """Return the fastest plan inside the budgets of ``hardware``.

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
            log.debug("nothing fits %s: %s", limits, step.phases)
            raise refusal(step, limits)
        for phase in found:
            log.debug("chosen: %s", phase)
        phases.extend(found)
    found_plan = Plan(
        tuple(phases),
        hardware.vram_bytes,
        hardware.ram_bytes,
        weight_format=manifest.storage.format,
        compute=policy.compute,
        compute_path=compute_path(manifest.storage, policy, hardware.rates),
        attention=policy.attention,
        step_cache=policy.step_cache,
        machine=hardware.name,
    )
    found_plan = with_prefetch(found_plan, manifest.prefetch, limits)
    for phase in found_plan.phases:
        if phase.prefetch_bytes or phase.prefetched_weights_bytes:
            log.debug("prefetches in %s", phase)
    return found_plan


def steps(
    manifest: Manifest, workload: Workload, hardware: Hardware, policy: Policy
) -> Iterator[Step]:
    """Return the groups of phases, in the order in which they run."""
    case = Case(manifest, workload, hardware.rates, policy, hardware.device, hardware.fused_norms)
    every: Iterator[Step] = manifest.steps(case)
    return (step for step in every if workload.written or not isinstance(step, Mux))


def minimum_vram_bytes(manifest: Manifest, workload: Workload, hardware: Hardware) -> int:
    """Return the least VRAM that any plan needs inside the RAM budget of ``hardware``.

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


def refusal(step: Step, limits: Limits) -> OverBudget:
    """Return why nothing of ``step`` fits: the smallest shape, in the memory that is too small for
    it."""
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
    manifest: Manifest,
    workload: Workload,
    hardware: Hardware,
    current: Plan,
    phase: str,
    resource: str,
    policy: Policy = Policy(),  # noqa: B008 (a frozen value)
) -> Plan | None:
    """Return ``current`` with the group of ``phase`` replaced by one that takes less memory.

    Plans with the same chunk of tokens are preferred, as their results are the same to the bit, and
    then those that keep the hidden states as they were.
    Nothing is read ahead of its phase any more.
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
    every = steps(manifest, workload, hardware, policy)
    names = next(step.phases for step in every if phase in step.phases)
    held = tuple(current[name] for name in names)
    now = measure(held)
    same_residual = policy_of({"residual": held[-1].residual}, policy)
    same_chunk = replace(same_residual, chunk_tokens=held[-1].chunk_tokens or None)
    for rules in (same_chunk, same_residual, policy):
        for limit_bytes in (int(SHRINK * now), now - 1):
            limits = _tightened(hardware, resource, limit_bytes)
            every = steps(manifest, workload, hardware, rules)
            found = next(step for step in every if step.phases == names).best(limits)
            log.debug("%s ran out in %s: %s within %d bytes", resource, phase, found, limit_bytes)
            if found and measure(found) < now:
                return without_prefetch(current, manifest.prefetch).with_phases(found)
    return None


def _tightened(hardware: Hardware, resource: str, limit_bytes: int) -> Limits:
    limits = Limits(hardware.vram_bytes, hardware.ram_bytes)
    if resource == "VRAM":
        return replace(limits, vram_bytes=min(limit_bytes, limits.vram_bytes))
    if resource == "RAM":
        return replace(limits, ram_bytes=min(limit_bytes, limits.ram_bytes))
    return replace(limits, both_bytes=limit_bytes)


def fits(
    manifest: Manifest,
    workload: Workload,
    hardware: Hardware,
    policy: Policy,
    limits: Limits,
) -> bool:
    """Return whether there is any plan inside ``limits``."""
    return all(
        any(group_fits(group, limits) for group in step.all_small(limits))
        for step in steps(manifest, workload, hardware, policy)
    )
