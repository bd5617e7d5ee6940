"""Distilled models: their noise levels, their sampler, and what ``--distilled`` fills in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.model.files import ModelFiles
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import DISTILLED, GenerationRequest, workload_of
from penstock.engine.request.settings import Settings, Suited, resolve
from penstock.engine.run.sampler import Sampler, SamplerState, initial_noise, step_generator
from penstock.errors import RequestError, UsageError
from tests.engine.run.test_budget import _run

SHAPE = (1, 16, 2, 4, 6)


def _sampler(sampler: str, steps: int = 4, seed: int = 9) -> Sampler:
    return Sampler({}, sampler=sampler, steps=steps, shift=5.0, distilled=True, seed=seed)


def _levels(steps: int, shift: float = 5.0) -> list[float]:
    """LightX2V's: places in a schedule of 1000, counted down, then shifted."""
    places = [1000 - 1000 * step // steps for step in range(steps)]
    return [shift * (x / 1000) / (1 + (shift - 1) * x / 1000) for x in places]


@pytest.mark.parametrize("sampler", ["lcm", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_timesteps_are_those_the_model_was_distilled_at(sampler: str, steps: int) -> None:
    expected = 1000 * torch.tensor(_levels(steps))
    assert torch.allclose(_sampler(sampler, steps).timesteps, expected, rtol=1e-6)


def test_four_steps_are_1000_750_500_250_shifted_by_5() -> None:
    found = [round(float(t), 4) for t in _sampler("lcm").timesteps]
    assert found == [1000.0, 937.5, 833.3334, 625.0] or found == [1000.0, 937.5, 833.3333, 625.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lcm_goes_to_the_end_and_back_with_fresh_noise(dtype: torch.dtype) -> None:
    sampler, latents = _sampler("lcm"), initial_noise(SHAPE, 1)
    levels = [*_levels(4), 0.0]
    for step in range(4):
        velocity = torch.sin(3 * latents).to(dtype)
        end = latents - levels[step] * velocity.float()
        noise = torch.randn(SHAPE, generator=step_generator(9, step))
        expected = (1 - levels[step + 1]) * end + levels[step + 1] * noise
        latents = sampler.step(velocity, step, latents)
        assert latents.dtype == torch.float32
        assert torch.allclose(latents, expected, atol=1e-5)


def test_euler_takes_the_same_levels_without_noise() -> None:
    sampler, latents = _sampler("euler"), initial_noise(SHAPE, 1)
    levels = [*_levels(4), 0.0]
    for step in range(4):
        velocity = torch.sin(3 * latents)
        expected = latents + (levels[step + 1] - levels[step]) * velocity
        latents = sampler.step(velocity, step, latents)
        assert torch.allclose(latents, expected, atol=1e-5)


def test_noise_differs_by_step_and_seed_and_from_the_first() -> None:
    drawn = [torch.randn(64, generator=step_generator(*key)) for key in ((1, 0), (1, 1), (2, 0))]
    drawn.append(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    for place, left in enumerate(drawn):
        for right in drawn[place + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 0.6


def test_a_state_of_another_seed_or_schedule_is_refused() -> None:
    state = _sampler("lcm").state()
    plain = Sampler({}, sampler="lcm", steps=4, shift=5.0, seed=9)
    for other in (_sampler("lcm", seed=8), plain):
        with pytest.raises(UsageError, match="other settings"):
            other.load_state(SamplerState(dict(state.values), {}))


@pytest.mark.parametrize("sampler", ["unipc", "dpm++"])
def test_solvers_of_higher_order_are_refused(sampler: str) -> None:
    with pytest.raises(RequestError, match="expected lcm or euler"):
        GenerationRequest(prompt="a cat", **(DISTILLED | {"sampler": sampler}))


@pytest.fixture(scope="module")
def model(t2v_folder: Path) -> ModelFiles:
    return ModelFiles.open(t2v_folder)


def _resolved(model: Suited, **given: Any) -> GenerationRequest:
    return resolve(Settings(prompt="a cat", size="64x48", frames=5, **given), model)


def test_what_is_left_open_suits_a_distilled_model(model: ModelFiles) -> None:
    request = _resolved(model, distilled=True)
    assert (request.steps, request.guidance_scale, request.shift) == (4, 1.0, 5.0)
    assert (request.sampler, request.distilled, request.uses_guidance) == ("lcm", True, False)
    assert _resolved(model).sampler == "unipc"
    assert not _resolved(model).distilled


def test_what_is_said_wins(model: ModelFiles) -> None:
    given = {"steps": 8, "guidance_scale": 2.0, "shift": 8.0, "sampler": "euler"}
    request = _resolved(model, distilled=True, **given)
    assert {name: getattr(request, name) for name in given} == given
    assert request.distilled


def test_one_branch_and_four_passes_are_planned(model: ModelFiles) -> None:
    described = Prepared.open(synthetic="wan2.1-i2v-14b", device="cpu").about
    for about in (model, described):
        found = workload_of(_resolved(about, distilled=True))
        assert (found.steps, found.branches) == (4, 1)
        assert workload_of(_resolved(about, distilled=True, steps=6)).steps == 6
        assert workload_of(_resolved(about, distilled=True, guidance_scale=5.0)).branches == 2


def test_a_distilled_job_is_the_same_each_time(t2v_folder: Path) -> None:
    with Engine.open(t2v_folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        request = replace(_resolved(engine.model, distilled=True), seed=4)
        plan = engine.plan(request)
        assert plan["denoise"].branches == 1
        first, second = (_run(engine, request, plan, overlapped=False).latents for _ in range(2))
        other = _run(engine, replace(request, seed=5), plan, overlapped=False).latents
    assert first is not None and second is not None and other is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
