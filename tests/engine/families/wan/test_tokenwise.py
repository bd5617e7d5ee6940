"""Wan2.2 TI2V: a picture, if there is one, is the first latent frame itself, at a timestep of its
own; and the VAE with shortcuts. As diffusers' pipelines do it, inside the plan, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan import forward as dit
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.report import JobResult
from penstock.errors import RequestError
from penstock.profiles.options import Options
from penstock.profiles.plan import StreamPlan
from tests.engine.families.wan.test_experts import _assert_theirs, _placed
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run
from tests.engine.running import an_engine, stop_after_a_step
from tests.makers import made_by_diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("ti2v"), image_to_video=False, tokenwise=True,
        seed=6, vae={"base_dim": 8}, transformer={"num_layers": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    # Two rows of tiles and three columns, and chunks that do not divide the tokens
    with an_engine(folder, options=Options(tiles="2x3", chunk_tokens="5")) as opened:
        yield opened


@pytest.fixture(scope="module", params=[False, True], ids=["text", "picture"])
def asked(request: pytest.FixtureRequest, picture: Path) -> GenerationRequest:
    return GenerationRequest(
        prompt="a red circle", negative_prompt="blurry", image=picture if request.param else None,
        width=96, height=64, frames=9, steps=4, seed=7, fit="stretch",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(engine: Engine, asked: GenerationRequest) -> JobResult:
    return engine.submit(asked).result()


def test_the_job_is_that_of_diffusers(
    folder: Path, engine: Engine, asked: GenerationRequest, whole: JobResult
) -> None:
    phases = [phase.name for phase in engine.plan(asked).phases]
    assert ("encode" in phases) == (asked.image is not None)
    assert engine.plan(asked)["decode"].tiles == (2, 3)
    _assert_theirs(whole, made_by_diffusers(folder, asked, 5.0))


def test_streamed_is_resident(engine: Engine, asked: GenerationRequest, whole: JobResult) -> None:
    plan = engine.plan(asked)
    found = [
        _run(engine, asked, _placed(plan, stream), overlapped=True)
        for stream in (StreamPlan(4, 4), StreamPlan(4, 1, 1, 1, 1))
    ]
    assert torch.equal(found[0].latents, found[1].latents)
    assert torch.equal(found[0].video, found[1].video)
    assert (found[0].latents - whole.latents).abs().max() <= 1e-5 * whole.latents.abs().max()


@pytest.mark.parametrize("asked", [True], indirect=True, ids=["picture"])
def test_a_stopped_job_goes_on(
    engine: Engine, asked: GenerationRequest, whole: JobResult, tmp_path: Path
) -> None:
    stop_after_a_step(engine, asked, tmp_path / "job")
    result = engine.resume(tmp_path / "job").result()
    assert torch.equal(result.latents, whole.latents)
    assert torch.equal(result.video, whole.video)


def test_nothing_passes_the_plan(engine: Engine, asked: GenerationRequest) -> None:
    plan = engine.plan(asked)
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = _run(engine, asked, plan, overlapped=True)
    assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
    for phase, promised in zip(result.report.phases, plan.phases, strict=False):
        assert phase.measured_vram_bytes <= promised.vram_bytes
        assert phase.measured_ram_bytes <= promised.ram_bytes


@pytest.mark.parametrize("asked", [True], indirect=True, ids=["picture"])
def test_the_picture_is_the_first_frame(engine: Engine, asked: GenerationRequest) -> None:
    latents = [engine.submit(replace(asked, seed=seed)).result().latents for seed in (1, 2)]
    assert torch.equal(latents[0][:, :, 0], latents[1][:, :, 0])
    assert not torch.equal(latents[0][:, :, 1], latents[1][:, :, 1])


@pytest.mark.parametrize("asked", [True], indirect=True, ids=["picture"])
def test_the_makers_settings_and_sizes(engine: Engine, asked: GenerationRequest) -> None:
    defaults = dict(engine.model.official.request_defaults)
    assert defaults == {
        "width": 1280, "height": 704, "frames": 121, "fps": 24, "steps": 50, "guidance_scale": 5.0,
    }  # fmt: skip
    assert engine.model.official.flow_shift(832, 480, None) == 5.0
    assert engine.model.grid.side == engine.model.official.grid.side == 32
    with pytest.raises(RequestError, match="last"):
        engine.plan(replace(asked, image=Path("a.png"), last_image=Path("b.png")))


def test_parts_of_a_forward_have_one_timestep_each() -> None:
    """Chunks are cut where the timesteps change, whatever their size."""
    for chunk in (1, 3, 4, 7, 100):
        parts = list(dit._chunks(10, chunk, 4))
        assert [token for part in parts for token in range(part.start, part.stop)] == list(
            range(10)
        )
        assert all(part.stop <= 4 or part.start >= 4 for part in parts)
        assert all(part.stop - part.start <= chunk for part in parts)
