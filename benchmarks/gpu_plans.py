"""What plans say today of the cases of the GPU suite: its results hold what plans said when it ran.

The first card that was measured showed what no CPU can: that torch normalises in one kernel there,
what cuDNN and cuBLAS take, and what the allocator holds between tensors. Plans count that since; so
a table sets what was held beside what a plan with the same places, chunk and tiles says now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.families.wan.builtin import wan21_i2v_14b
from penstock.engine.families.wan.cost import transformer
from penstock.engine.families.wan.denoise_plan import CHUNKS
from penstock.engine.families.wan.plan import Tiled
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import CUDA_LIBRARY_BYTES, Case, Workload
from penstock.profiles.plan import PhasePlan
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates

MODEL = wan21_i2v_14b("int8")
SHAPE = VideoShape(1280, 720, 81)
"""The suite's large video."""

_LATENT = SHAPE.latent(MODEL.vae)
_ROOM = Limits(1 << 50, 1 << 50)


def step_bytes(row: Mapping[str, Any], *, fused: bool = True) -> int:
    """VRAM of a guided step with its blocks where the row's case of "peaks" had them.

    Args:
        fused: norms are one kernel, as on CUDA; else as torch composes them on a CPU.
    """
    return _step_bytes(row, chunk_of(row), fused)


def chunk_of(row: Mapping[str, Any]) -> int:
    """The row's chunk of tokens: told, or the one whose bytes were planned, norms composed."""
    if "chunk_tokens" in row:
        return int(row["chunk_tokens"])
    tokens = transformer.grid_tokens(MODEL.transformer, _LATENT)
    (found,) = (
        chunk
        for chunk in (tokens, *CHUNKS)
        if _step_bytes(row, chunk, fused=False) == row["planned_bytes"]
    )
    return found


def _step_bytes(row: Mapping[str, Any], chunk: int, fused: bool) -> int:
    place, spec = row["placement"], MODEL.transformer
    case = transformer.DenoiseCase(
        _LATENT, chunk, branches=2, visit_branches=place["branches_a_visit"], steps=1,
        image_tokens=257, cross_kv_on_device=bool(place["cross_kv_on_device"]),
        fused_norms=fused,
    )  # fmt: skip
    blocks = place["device_resident"] + place["device_slots"]
    weights = spec.weights.rest_bytes + blocks * max(spec.weights.block_bytes)
    decoding = spec.storage.scratch_bytes + spec.storage.workspace_bytes
    work = transformer.denoise_bytes(spec, case).total_bytes
    return int(weights + work + decoding + CUDA_LIBRARY_BYTES)


def vae_phase(case: str, row: Mapping[str, Any]) -> PhasePlan:
    """The plan of a case of "vae", in the tiles that it had."""
    # Rows that do not tell are of an engine that computed every frame.
    changes = tuple(row.get("changes", range(SHAPE.frames)))
    work = Workload(SHAPE, 1, guided=False, changes=changes)
    half = case.partition(",")[0]
    policy = Policy(tiles=tuple(row["tiles"]))
    found = Tiled(half, Case(MODEL, work, Rates(1e12, 1e10, 1e9), policy, "cuda")).best(_ROOM)
    assert found is not None
    return found[0]
