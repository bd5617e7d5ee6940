"""A whole job's frames and sound: what diffusers' VAEs make of its latents; and its mp4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from penstock.cli.progress import report_summary
from penstock.engine.engine import Engine
from penstock.engine.families.minimax_h3.layout import unpack
from penstock.engine.families.minimax_h3.video_vae import vit
from penstock.engine.families.minimax_h3.video_vae.decode import denormalised
from penstock.engine.request.generation import GenerationRequest
from tests.engine.families.minimax_h3 import tiny

FRAMES = 124


@dataclass(frozen=True)
class Made:
    """A job with two pictures, its model, and where its file is."""

    model: tiny.TinyH3
    result: Any
    plan: Any
    sound: torch.Tensor
    path: Path
    packed_bytes: int


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("h3 film")
    model = tiny.write(folder / "model")
    picture = tiny.picture(folder / "picture.png")
    last: list[torch.Tensor] = []
    with Engine.open(model.folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        values = {**engine.model.official.request_defaults, "frames": FRAMES, "steps": 2}
        request = GenerationRequest(
            "a red fox", grid=engine.model.grid, seed=1, image=picture, last_image=picture,
            **(values | {"width": 64, "height": 32}),
        )  # fmt: skip
        plan, path = engine.plan(request), folder / "film.mp4"
        job = engine.submit(request, path, on_step=lambda step, latents: last.append(latents))
        result = job.result()
        _, sound = unpack(last[-1], engine.model.sizes(request.video_shape))
    return Made(model, result, plan, sound, path, last[-1].nbytes)


def test_frames_are_the_vaes_own(made: Made) -> None:
    vae = made.model.parts["vae"]
    with torch.inference_mode():
        pixels = vae.decode(denormalised(made.result.latents, vae.config), return_dict=False)[0]
    mean, deviation = (
        torch.tensor(each).view(1, 3, 1, 1, 1) for each in (vit.PIXEL_MEAN, vit.PIXEL_STD)
    )
    unit = (pixels * deviation + mean).clamp(0, 1)
    wanted = (unit * 255).round().byte()[0].permute(1, 2, 3, 0)
    assert torch.equal(made.result.video, wanted)


def test_sound_is_the_audio_vaes_own(made: Made) -> None:
    vae, sound = made.model.parts["audio_vae"], made.result.sound
    mean, deviation = (
        torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1) for name in ("mean", "std")
    )
    with torch.inference_mode():
        wanted = vae.decode(made.sound * deviation + mean, return_dict=False)[0][:, 0]
    assert np.array_equal(sound.samples, wanted.numpy())
    assert sound.rate == vae.config["sampling_rate"]
    assert made.result.report.sound_s == sound.seconds
    assert f"{sound.seconds:.2f} s of sound" in report_summary(made.result.report)


def test_no_phase_takes_more_than_planned(made: Made) -> None:
    names = ["vision", "text", "encode", "context", "denoise", "decode", "sound", "mux"]
    assert [phase.name for phase in made.plan.phases] == names
    measured = {phase.name: phase for phase in made.result.report.phases}
    for phase in made.plan.phases:
        seen = measured[phase.name]
        # A plan does not know of ``on_step``, which is given a copy of the latents.
        copied = made.packed_bytes if phase.name == "denoise" else 0
        assert seen.measured_vram_bytes <= phase.vram_bytes
        assert seen.measured_ram_bytes <= phase.ram_bytes + copied
        assert measured[phase.name].read_bytes <= phase.read_bytes


def test_the_file_holds_frames_and_sound_in_step(made: Made) -> None:
    with av.open(str(made.path)) as file:
        (video,), (audio,) = file.streams.video, file.streams.audio
        assert (video.average_rate, video.start_time, audio.channels) == (24, 0, 2)
        assert audio.rate == 48000  # AAC knows no lower rate that is so low
        seconds = float(audio.duration * audio.time_base)
        begins = float(audio.start_time * audio.time_base)
        assert sum(1 for _ in file.decode(video=0)) == FRAMES
    assert abs(begins) < 1 / 24
    assert seconds == pytest.approx(made.result.sound.seconds, abs=0.005)
    assert abs(seconds - FRAMES / 24) < 1 / 24 + 1 / 40  # latents of the sound are 40 a second
