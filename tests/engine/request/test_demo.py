"""The trained model in the box: a true Wan model, and the same video however it is run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

import penstock
from penstock.engine.engine import Engine
from penstock.engine.families.wan.defaults import flow_shift, negative_prompt
from penstock.engine.request.demo import DEMO_PROMPT, MINI, demo_picture
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import Settings, resolve
from penstock.profiles.options import Options
from tests.faults.child import Task
from tests.makers import makers_unipc

SMALLEST = "9MiB"


def _request(engine: Engine) -> GenerationRequest:
    return resolve(Settings(prompt=DEMO_PROMPT, image=demo_picture(), seed=3), engine.model)


def _weight_bytes() -> int:
    return sum(path.stat().st_size for path in MINI.rglob("*.safetensors"))


def test_it_lies_inside_the_package_and_is_small() -> None:
    assert MINI.is_relative_to(Path(penstock.__file__).parent)
    assert sum(path.stat().st_size for path in MINI.rglob("*")) <= 24_000_000


def test_diffusers_opens_it_and_makes_the_same_video() -> None:
    with Engine.open(MINI, device="cpu") as engine:
        request = replace(_request(engine), clip_crop="center")  # diffusers' own
        ours = engine.submit(request).result().video.numpy().astype(int)
    pipe = WanImageToVideoPipeline.from_pretrained(MINI)
    pipe.to(torch.float32)
    pipe.scheduler = makers_unipc(pipe.scheduler.config, pipe.scheduler.config.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=Image.open(demo_picture()).convert("RGB"),
        prompt=request.prompt,
        negative_prompt=negative_prompt(request),
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    assert pipe.scheduler.config.flow_shift == flow_shift(
        request.width, request.height, request.shift
    )
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_streamed_tiled_killed_and_resumed_it_makes_the_same_frames(tmp_path: Path) -> None:
    with Engine.open(MINI, device="cpu") as engine:
        untiled = engine.submit(_request(engine)).result().video
    rules = Options(tiles="2x2", chunk_tokens="80")  # the same roundings
    with Engine.open(MINI, device="cpu", options=rules) as engine:
        resident = engine.submit(_request(engine)).result().video
    assert (resident.int() - untiled.int()).abs().max() <= 1
    with Engine.open(MINI, device="cpu", vram=SMALLEST, options=rules) as engine:
        request = _request(engine)
        plan = engine.plan(request)
        assert plan["decode"].tiles == (2, 2)
        # Activations do not shrink with the model: what is a fifth are the weights on the device.
        held = sum(count for _, count in plan["denoise"].weights)
        assert held <= _weight_bytes() / 5
        assert torch.equal(engine.submit(request).result().video, resident)
        killed = Task(engine, request, tmp_path / "killed")
        killed.folder.mkdir()
        attempt = killed.attempt(kill_at_step=3)
        assert attempt.was_killed and attempt.steps == (1, 2, 3)
        assert torch.equal(engine.resume(killed.job).result().video, resident)
