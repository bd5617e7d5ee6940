"""Plans against what a card was seen to take: the results of the GPU suite that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import render
from benchmarks.gpu_context import LARGE_CONTEXT_BYTES
from benchmarks.gpu_plans import step_bytes, vae_phase
from penstock.profiles.phases import HOLES

RESULTS = render.read_results(render.RESULTS)


def rows(group: str) -> Iterator[Any]:
    for name, suite in RESULTS.items():
        if name.startswith("gpu_suite"):
            for case, row in render.done(suite["groups"], group):
                yield pytest.param(case, row, id=f"{name}, {case}")


@pytest.mark.parametrize(
    ("case", "row"), [each for each in rows("peaks") if "placement" in each.values[1]]
)
def test_a_step_takes_what_is_planned_and_at_most_five_percent_less(case: str, row: Any) -> None:
    assert row["reserved_bytes"] <= step_bytes(row) <= 1.05 * row["reserved_bytes"], case
    assert row["within_budget"] and row["within_card"]
    assert row["driver_bytes"] <= LARGE_CONTEXT_BYTES


@pytest.mark.parametrize(("case", "row"), rows("vae"))
def test_the_vae_takes_no_more_than_is_planned(case: str, row: Any) -> None:
    phase = vae_phase(case, row)
    tensors = phase.vram_bytes - dict(phase.work)[HOLES]
    assert row["reserved_bytes"] <= phase.vram_bytes <= 1.15 * row["reserved_bytes"], case
    assert row["tensor_bytes"] <= tensors <= 1.08 * row["tensor_bytes"], case


@pytest.mark.parametrize(("case", "row"), rows("correctness"))
def test_wherever_the_blocks_live_the_bits_are_the_same(case: str, row: Any) -> None:
    assert row["identical"], case


def test_there_are_results_of_a_card() -> None:
    assert len([*rows("peaks")]) >= 4 and len([*rows("vae")]) >= 4
