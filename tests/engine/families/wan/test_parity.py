"""The whole job against diffusers' own pipelines, on tiny random models, with the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.families.wan.defaults import flow_shift, negative_prompt
from penstock.engine.request.generation import GenerationRequest
from penstock.profiles.options import Options
from tests.makers import makers_levels, makers_unipc

STEPS = 6
SHAPES = [(64, 48, 9), (80, 64, 5), (48, 112, 13)]


def _theirs(pipeline_class: Any, folder: Path, request: GenerationRequest, latents: bool) -> Any:
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    from_picture = request.image is not None
    shift = flow_shift(request.width, request.height, request.shift, image_to_video=from_picture)
    pipe.scheduler = makers_unipc(pipe.scheduler.config, shift)
    picture = {} if request.image is None else {"image": Image.open(request.image).convert("RGB")}
    return pipe(
        **picture,
        prompt=request.prompt,
        negative_prompt=negative_prompt(request),
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed or 0),
        output_type="latent" if latents else "np",
    ).frames


def _request(shape: tuple[int, int, int], image: Path | None) -> GenerationRequest:
    width, height, frames = shape
    return GenerationRequest(
        prompt="a red circle moves to the right",
        negative_prompt="blurry",
        image=image,
        width=width,
        height=height,
        frames=frames,
        steps=STEPS,
        seed=7,
        clip_crop="center",  # as diffusers does
        fit="stretch",
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("image_to_video", [True, False], ids=["i2v", "t2v"])
def test_the_job_is_that_of_diffusers(
    shape: tuple[int, int, int],
    image_to_video: bool,
    i2v_folder: Path,
    t2v_folder: Path,
    picture: Path,
) -> None:
    folder = i2v_folder if image_to_video else t2v_folder
    pipeline_class = WanImageToVideoPipeline if image_to_video else WanPipeline
    request = _request(shape, picture if image_to_video else None)
    # Four rows do not divide 6 latents, nor three columns 8 or 14: unequal tiles; many chunks.
    rules = Options(tiles="4x3", chunk_tokens="50", branches="2")
    with Engine.open(folder, device="cpu", vram="200MiB", ram="200MiB", options=rules) as engine:
        assert engine.plan(request)["decode"].tiles == (4, 3)
        result = engine.submit(request).result()
    shift = 3.0 if image_to_video else 5.0
    told = (1000 * makers_levels(0.999, STEPS, shift)).astype(int).tolist()
    assert list(result.report.to_json()["timesteps"]) == told
    latents = _theirs(pipeline_class, folder, request, latents=True)
    assert result.latents is not None
    assert (result.latents - latents).abs().max() <= 1e-5 * latents.abs().max()
    frames = np.round(_theirs(pipeline_class, folder, request, latents=False)[0] * 255)
    assert result.video is not None
    assert np.abs(result.video.numpy().astype(int) - frames).max() <= 1
