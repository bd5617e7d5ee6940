"""Previews: the right colours, at no change of the result and no more memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.families.wan.latent_rgb import BIAS, FACTORS
from penstock.engine.families.wan.preview import published_map
from penstock.engine.run.events import Notice, Progress
from penstock.engine.run.job import Job
from penstock.engine.run.preview import Preview, Previewer, RgbMap, fit_map
from tests.engine.running import a_request, an_engine


@pytest.fixture(scope="module")
def engine(t2v_folder: Path) -> Iterator[Engine]:
    with an_engine(t2v_folder) as opened:
        yield opened


def _previews(job: Job) -> dict[int, Preview | None]:
    return {
        event.step: event.preview
        for event in job.events()
        if isinstance(event, Progress) and event.phase == "denoise"
    }


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_every_so_many_steps_and_the_result_stays_the_same(
    engine: Engine, every: int, steps: list[int]
) -> None:
    expected = engine.submit(a_request(steps=4)).result()
    job = engine.submit(a_request(steps=4), preview_every=every)
    result = job.result()
    previews = _previews(job)
    assert [step for step, preview in previews.items() if preview is not None] == steps
    assert torch.equal(result.latents, expected.latents)
    assert torch.equal(result.video, expected.video)
    for preview in filter(None, previews.values()):
        assert (preview.width, preview.height, len(preview.rgb)) == (6, 4, 72)
        assert preview.to_image().size == (6, 4)
        assert preview.to_image().tobytes() == preview.rgb


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_the_last_preview_is_that_of_the_result(engine: Engine, sampler: str) -> None:
    """Each solver's last step goes to its own estimate of the result: the latents it ends with."""
    job = engine.submit(a_request(sampler=sampler, steps=4), preview_every=1)
    latents = job.result().latents
    last = _previews(job)[4]
    assert last is not None
    rgb_map = engine._previewer._map
    assert rgb_map is not None
    wanted = (rgb_map(latents[0, :, 1]) * 127.5 + 127.5).round().clamp(0, 255)
    found = torch.tensor(np.frombuffer(last.rgb, np.uint8).reshape(4, 6, 3).astype(np.float32))
    assert (found - wanted).abs().max() <= 1  # where the solver rounds otherwise


def test_an_unknown_vae_is_fitted_once_and_says_how_well(t2v_folder: Path) -> None:
    with an_engine(t2v_folder) as engine:
        first = engine.submit(a_request(), preview_every=2)
        assert first.result().report.peak_vram_bytes <= first.plan.peak_vram_bytes
        notes = [e.message for e in first.events() if isinstance(e, Notice)]
        assert len(notes) == 1
        assert notes[0].startswith("previews: colours are fitted to this VAE, explaining ")
        second = engine.submit(a_request(), preview_every=2)
        second.result()
        assert not [e for e in second.events() if isinstance(e, Notice)]


def test_a_linear_vae_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    factors, bias = torch.randn(16, 3, generator=generator) * 0.05, torch.tensor([0.1, -0.2, 0.3])
    checks: list[None] = []

    def decode(latents: Tensor) -> Tensor:
        pixels = torch.einsum("zhw,zc->hwc", latents[0, :, 0], factors) + bias
        pixels = pixels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[None]

    found = fit_map(decode, 16, (90, 160), lambda: checks.append(None))
    assert torch.allclose(found.factors, factors, atol=2e-3)  # pixels are rounded to 1/127.5
    assert torch.allclose(found.bias, bias, atol=2e-3)
    assert found.note == "fitted to this VAE, explaining 100 % of it"
    assert len(checks) == 8


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16)])
def test_a_fit_of_few_or_flat_pictures_is_finite(size: tuple[int, int]) -> None:
    def flat(latents: Tensor) -> Tensor:
        height, width = latents.shape[-2:]
        return torch.full((1, 8 * height, 8 * width, 3), 200, dtype=torch.uint8)

    found = fit_map(flat, 16, size, lambda: None)
    pixels = found(torch.zeros(16, 2, 2))
    assert torch.allclose(pixels, torch.full((2, 2, 3), 200 / 127.5 - 1), atol=1e-3)


def test_the_published_vae_takes_the_published_map() -> None:
    found = published_map(AutoencoderKLWan().config)
    assert found is not None
    assert torch.equal(found.factors, torch.tensor(FACTORS))
    assert torch.equal(found.bias, torch.tensor(BIAS))
    assert found.factors.shape == (16, 3)
    assert published_map(AutoencoderKLWan(base_dim=8).config) is None


def test_the_estimate_is_what_noise_and_result_were_mixed_from() -> None:
    generator = torch.Generator().manual_seed(1)
    result, noise = torch.randn(2, 1, 3, 5, 2, 2, generator=generator)
    identity = RgbMap(torch.eye(3), torch.zeros(3), "as they are")
    previewer = Previewer()
    assert not previewer.is_ready
    previewer.use(identity)
    expected = previewer.make(result, torch.zeros_like(result), 0.0)
    for sigma in (0.1, 0.5, 0.9):
        mixed = (1 - sigma) * result + sigma * noise
        found = previewer.make(mixed, noise - result, sigma)
        difference = np.frombuffer(found.rgb, np.uint8).astype(int) - np.frombuffer(
            expected.rgb, np.uint8
        )
        assert np.abs(difference).max() <= 1
