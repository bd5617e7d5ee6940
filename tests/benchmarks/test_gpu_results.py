"""Plans against what a card was seen to take: the results of the GPU suite that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from benchmarks import render
from benchmarks.gpu_cases import LARGE_CONTEXT_BYTES
from benchmarks.gpu_suite import is_done
from penstock.profiles.builtin import builtin
from penstock.profiles.cost import transformer
from penstock.profiles.denoising import CHUNKS
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import CUDA_LIBRARY_BYTES, Case, Tiled, Workload
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates

RESULTS = render.read_results(render.RESULTS)
MODEL = builtin("wan2.1-i2v-14b", "int8")
SHAPE = VideoShape(1280, 720, 81)
LATENT = SHAPE.latent(MODEL.vae)
ROOM = Limits(1 << 50, 1 << 50)


def rows(group: str) -> Iterator[Any]:
    for name, suite in RESULTS.items():
        if name.startswith("gpu_suite"):
            for case, row in suite["groups"].get(group, {}).items():
                if is_done(row):
                    yield pytest.param(case, row, id=f"{name}, {case}")


def denoise_bytes(row: Mapping[str, Any], chunk: int, *, fused: bool) -> int:
    """What a plan says today of a guided step with its blocks where the row's were."""
    place, spec = row["placement"], MODEL.transformer
    case = transformer.DenoiseCase(
        LATENT, chunk, branches=2, visit_branches=place["branches_a_visit"], steps=1,
        image_tokens=257, cross_kv_on_device=bool(place["cross_kv_on_device"]),
        fused_norms=fused,
    )  # fmt: skip
    blocks = place["device_resident"] + place["device_slots"]
    weights = spec.weights.rest_bytes + blocks * max(spec.weights.block_bytes)
    decoding = spec.storage.scratch_bytes + spec.storage.workspace_bytes
    work = transformer.denoise_bytes(spec, case).total_bytes
    return weights + work + decoding + CUDA_LIBRARY_BYTES


def chunk_of(row: Mapping[str, Any]) -> int:
    """The row's chunk: told, or the one whose bytes are those that were planned, with the norms
    counted as torch composes them on a CPU."""
    if "chunk_tokens" in row:
        return int(row["chunk_tokens"])
    tokens = transformer.grid_tokens(MODEL.transformer, LATENT)
    (found,) = (
        chunk
        for chunk in (tokens, *CHUNKS)
        if denoise_bytes(row, chunk, fused=False) == row["planned_bytes"]
    )
    return found


@pytest.mark.parametrize(
    ("case", "row"), [each for each in rows("peaks") if "placement" in each.values[1]]
)
def test_a_step_takes_what_is_planned_and_at_most_five_percent_less(case: str, row: Any) -> None:
    planned = denoise_bytes(row, chunk_of(row), fused=True)
    assert row["reserved_bytes"] <= planned <= 1.05 * row["reserved_bytes"], case
    assert row["within_budget"] and row["within_card"]
    assert row["driver_bytes"] <= LARGE_CONTEXT_BYTES


@pytest.mark.parametrize(("case", "row"), rows("vae"))
def test_the_vae_takes_no_more_than_is_planned(case: str, row: Any) -> None:
    half = case.partition(",")[0]
    policy, work = Policy(tiles=tuple(row["tiles"])), Workload(SHAPE, 1, guided=False)
    planner = Tiled(half, Case(MODEL, work, Rates(1e12, 1e10, 1e9), policy, "cuda"))
    found = planner.best(ROOM)
    assert found is not None
    (phase,) = found
    holes = dict(phase.work)["holes between tensors"]
    assert row["reserved_bytes"] <= phase.vram_bytes <= 1.15 * row["reserved_bytes"], case
    assert row["tensor_bytes"] <= phase.vram_bytes - holes <= 1.08 * row["tensor_bytes"], case


@pytest.mark.parametrize(("case", "row"), rows("correctness"))
def test_wherever_the_blocks_live_the_bits_are_the_same(case: str, row: Any) -> None:
    assert row["identical"], case


def test_there_are_results_of_a_card() -> None:
    assert len([*rows("peaks")]) >= 4 and len([*rows("vae")]) >= 4
