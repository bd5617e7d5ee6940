"""What a network that is visited once takes, where nothing but its arithmetic counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.engine.families.wan.denoise_plan import Denoise
from penstock.engine.families.wan.plan import HOLE_SHARES, Tiled, image_step, text_step
from penstock.engine.family.protocol import builtin
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import CUDA_LIBRARY_BYTES, HOLES, LIBRARIES, Case, Step, Workload
from penstock.profiles.planner import plan
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates

ROOM = Limits(1 << 50, 1 << 50, None, None)
FREE = Rates(1e30, 1e30, 1e30, overhead_s=1e-9, element_s=1e-30)


def a_case(rates: Rates) -> Case:
    workload = Workload(VideoShape(64, 64, 5), 1, guided=True)
    return Case(builtin("wan2.1-i2v-14b", "bf16"), workload, rates, Policy(), "cpu")


def seconds(name: str, rates: Rates) -> float:
    case = a_case(rates)
    if name == "context":
        return next(Denoise(case)._contexts(False, "bf16", ROOM)).seconds
    image = case.manifest.image
    assert image is not None
    network = text_step(case) if name == "text" else image_step(case, image)
    return next(network.shapes(ROOM)).seconds


def test_a_file_is_planned_where_one_is_written() -> None:
    """A pipeline that is not ours takes the frames themselves."""
    case = a_case(FREE)
    machine = Hardware("cpu", "a machine", 1 << 50, 1 << 50, FREE)
    ours, theirs = (
        plan(case.manifest, replace(case.workload, written=written), machine).phases
        for written in (True, False)
    )
    assert [phase.name for phase in theirs] == [phase.name for phase in ours[:-1]]
    assert ours[-1].name == "mux"


@pytest.mark.parametrize(("name", "visits"), [("text", 2 * 24), ("image", 31), ("context", 2 * 40)])
def test_each_visit_takes_what_a_chunk_takes(name: str, visits: int) -> None:
    """Both prompts visit the layers of the text encoder and the blocks of the transformer, the
    picture all layers of its encoder but the last."""
    assert seconds(name, replace(FREE, overhead_s=1.0)) == pytest.approx(visits)


@pytest.mark.parametrize(
    ("name", "elements"),
    [("text", 2 * 24 * 512 * 4096), ("image", 31 * 257 * 1280), ("context", 0)],
)
def test_elements_of_hidden_states_are_counted(name: str, elements: int) -> None:
    found = seconds(name, replace(FREE, element_s=1e-6))
    assert found == pytest.approx(elements * 1e-6, rel=1e-3, abs=1e-6)


def test_a_gpu_has_an_item_for_its_libraries_and_one_for_holes() -> None:
    """In every phase that computes there, and no other machine has one."""
    case = replace(a_case(FREE), workload=Workload(VideoShape(832, 480, 81), 1, guided=True))
    for device in ("cpu", "cuda"):
        on = replace(case, device=device)
        image = on.manifest.image
        assert image is not None
        steps: list[Step] = [text_step(on), image_step(on, image), Denoise(on)]
        steps += [Tiled("encode", on), Tiled("decode", on)]
        groups = [step.best(ROOM) for step in steps]
        phases = {phase.name: dict(phase.work) for group in groups for phase in group or ()}
        assert set(phases) == {"text", "image", "context", "denoise", "encode", "decode"}
        for name, work in phases.items():
            assert (LIBRARIES in work) == (device == "cuda")
            assert (HOLES in work) == (device == "cuda" and name in HOLE_SHARES)
        if device == "cuda":
            assert phases["decode"][LIBRARIES] > CUDA_LIBRARY_BYTES == phases["text"][LIBRARIES]
            # input and result of the last level's convolutions: three frames of 96 channels, one
            frame = 96 * 480 * 832 * 2
            assert phases["decode"][LIBRARIES] == CUDA_LIBRARY_BYTES + 4 * frame


def test_norms_of_one_kernel_leave_room_for_larger_chunks() -> None:
    case = replace(a_case(FREE), workload=Workload(VideoShape(832, 480, 81), 1, guided=True))
    composed, fused = (
        next(iter(Denoise(replace(case, fused_norms=is_fused))._shapes)).work_bytes
        for is_fused in (False, True)
    )
    assert composed - fused == 6 * 5120 * 32_760  # 14 bytes a channel and token, and 8
