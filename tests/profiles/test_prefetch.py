"""Blocks that are read before their phase: only inside the budgets, and until their phase."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings

from penstock.errors import OverBudget
from penstock.profiles.manifest import Prefetch
from penstock.profiles.plan import (
    PREFETCHED,
    WEIGHTS_PREFETCHED,
    PhasePlan,
    Plan,
    StreamPlan,
    changes,
)
from penstock.profiles.planner import plan, smaller
from penstock.profiles.policy import Limits
from penstock.profiles.prefetch import with_prefetch, without_prefetch
from tests.profiles.small import machines, manifests, workloads


def phase(name: str, ram: int, pinned: int = 0) -> PhasePlan:
    return PhasePlan(name, (("w", 5),), (), (("staging buffers", ram),), pinned_bytes=pinned)


def a_plan(text: int, image: int, context: int) -> Plan:
    stream = StreamPlan(4, 0, 1, 2, 2)
    held = (("resident blocks", 10), ("staging buffers", 20))
    denoise = PhasePlan("denoise", (), (), held, stream=stream, pinned_bytes=30)
    before = (phase("text", text, text), phase("image", image), phase("context", context))
    return Plan((*before, denoise, phase("decode", 1)), 100, 100)


WHAT = Prefetch("denoise", "transformer", "decode", "vae decoder")


def prefetched(found: Plan) -> list[int]:
    return [each.prefetch_bytes for each in found.phases]


def test_from_the_first_phase_from_which_all_have_room() -> None:
    roomy = Limits(100, 100)
    assert prefetched(with_prefetch(a_plan(70, 70, 70), WHAT, roomy)) == [30, 30, 30, 0, 0]
    assert prefetched(with_prefetch(a_plan(71, 70, 70), WHAT, roomy)) == [0, 30, 30, 0, 0]
    assert prefetched(with_prefetch(a_plan(10, 71, 70), WHAT, roomy)) == [0, 0, 30, 0, 0]
    assert prefetched(with_prefetch(a_plan(10, 10, 71), WHAT, roomy)) == [0, 0, 0, 0, 0]


def test_pinned_memory_and_a_shared_one_are_limits_too() -> None:
    found = a_plan(40, 10, 10)
    assert prefetched(with_prefetch(found, WHAT, Limits(100, 100, pinned_bytes=70))) == [
        30,
        30,
        30,
        0,
        0,
    ]
    assert prefetched(with_prefetch(found, WHAT, Limits(100, 100, 69))) == [0, 30, 30, 0, 0]
    assert prefetched(with_prefetch(found, WHAT, Limits(100, 100, both_bytes=74))) == [
        0,
        30,
        30,
        0,
        0,
    ]
    assert with_prefetch(found, WHAT, Limits(100, 100))["text"].pinned_bytes == 70


def test_nothing_to_read_ahead_into() -> None:
    found = a_plan(1, 1, 1)
    staged = replace(found["denoise"], ram_weights=(("resident blocks", 0), ("staging", 9)))
    assert prefetched(with_prefetch(found.with_phases((staged,)), WHAT, Limits(99, 99))) == [0] * 5


def test_the_decoder_where_both_its_phase_and_the_one_before_have_room() -> None:
    found = a_plan(1, 1, 1)
    wide = with_prefetch(found, WHAT, Limits(100, 35))
    assert wide["denoise"].ram_weights[-1] == (WEIGHTS_PREFETCHED, 5)
    assert wide["decode"].ram_weights == ((WEIGHTS_PREFETCHED, 5),)
    assert wide["denoise"].pinned_bytes == 35 and wide["decode"].pinned_bytes == 5
    narrow = (Limits(100, 34), Limits(100, 100, pinned_bytes=34), Limits(100, 100, both_bytes=34))
    for limits in narrow:
        assert with_prefetch(found, WHAT, limits)["denoise"] == found["denoise"]
        assert with_prefetch(found, WHAT, limits)["decode"] == found["decode"]
    large = replace(found["decode"], ram_work=(("video frames", 96),))
    kept = with_prefetch(found.with_phases((large,)), WHAT, Limits(100, 100))
    assert kept["decode"] == large and kept["denoise"].prefetched_weights_bytes == 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(manifests(), workloads, machines)
def test_a_plan_counts_what_it_reads_ahead(model, work, machine) -> None:
    try:
        found = plan(model, work, machine)
    except OverBudget:
        return
    bare = without_prefetch(found, WHAT)
    assert prefetched(bare) == [0] * len(bare.phases)
    assert not any(each.prefetched_weights_bytes for each in bare.phases)
    assert with_prefetch(bare, WHAT, Limits(machine.vram_bytes, machine.ram_bytes)) == found
    assert found.peak_ram_bytes <= machine.ram_bytes and found.seconds == bare.seconds
    held = [each for each in found.phases if each.prefetch_bytes]
    if not held:
        return
    names = [each.name for each in found.phases]
    begins, ends = names.index(held[0].name), names.index("denoise")
    assert held == list(found.phases[begins:ends])
    denoise = dict(found["denoise"].ram_weights)
    room = denoise["resident blocks"] + denoise["staging buffers"]
    for each in held:
        assert each.ram_weights[-1] == (PREFETCHED, room)
    assert Plan.from_json(found.to_json()) == found
    less = smaller(model, work, machine, found, held[0].name, "RAM")
    assert less is not None and prefetched(less) == [0] * len(less.phases)
    told, identical = changes(found, less)
    assert "no blocks read ahead instead of the first blocks read ahead" in told
