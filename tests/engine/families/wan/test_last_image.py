"""A video between two pictures: as diffusers makes it, inside its plan, kept and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.jobs import describe
from penstock.errors import CheckpointError, JournalError, RequestError
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter
from tests.engine.running import a_request, stop_after_a_step
from tests.makers import made_by_diffusers

PLACES = 2 * 17  # of a picture of 32 pixels in patches of 8, and the class token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("flf2v"),
        seed=3,
        vae={"base_dim": 8},
        transformer={"pos_embed_seq_len": PLACES},
    )


@pytest.fixture(scope="module")
def engine(folder: Path):
    with Engine.open(folder, device="cpu", vram="200MiB", ram="200MiB") as opened:
        yield opened


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("last") / "last.png"
    image = Image.linear_gradient("L").resize((70, 90))
    Image.merge("RGB", (image.rotate(180), image, image.rotate(90))).save(path)
    return path


def _request(picture: Path, last: Path, **changes: object) -> GenerationRequest:
    same = {"image": picture, "last_image": last, "clip_crop": "center", "fit": "stretch"}
    return a_request(**same, **changes)


def test_the_job_is_that_of_diffusers(
    engine: Engine, folder: Path, picture: Path, last: Path
) -> None:
    request = _request(picture, last, frames=9, steps=4)
    result = engine.submit(request).result()
    shift = 16.0  # the makers' for this model
    found = made_by_diffusers(folder, request, shift, last, negative_prompt="")
    latents = found["latent"]
    assert (result.latents - latents).abs().max() <= 1e-5 * latents.abs().max()
    frames = np.round(found["np"][0] * 255)
    assert np.abs(result.video.numpy().astype(int) - frames).max() <= 1


def test_nothing_passes_the_plan(engine: Engine, picture: Path, last: Path) -> None:
    request = _request(picture, last, frames=9)
    plan = engine.plan(request)
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = engine.submit(request).result()
    assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
    for phase, promised in zip(result.report.phases, plan.phases, strict=False):
        assert phase.measured_vram_bytes <= promised.vram_bytes
        assert phase.measured_ram_bytes <= promised.ram_bytes


def test_a_stopped_job_has_both_pictures(
    engine: Engine, picture: Path, last: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "last.png"
    copy.write_bytes(last.read_bytes())
    expected = engine.submit(_request(picture, last)).result()
    job = tmp_path / "job"
    stop_after_a_step(engine, _request(picture, copy), job)
    copy.unlink()
    assert (job / "last-picture").read_bytes() == last.read_bytes()
    (job / "conditioning.safetensors").unlink()  # so that both are seen again
    resumed = engine.resume(job).result()
    assert torch.equal(resumed.latents, expected.latents)
    assert torch.equal(resumed.video, expected.video)


def test_a_lost_or_damaged_copy_is_told(
    engine: Engine, picture: Path, last: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    stop_after_a_step(engine, _request(picture, last), job)
    place = job / "last-picture"
    place.write_bytes(picture.read_bytes())
    with pytest.raises(JournalError, match="last-picture is damaged"):
        engine.resume(job)
    place.unlink()
    assert describe(job).problem == "its picture is missing"


def test_the_last_picture_matters(engine: Engine, picture: Path, last: Path) -> None:
    one, other = (
        engine.submit(replace(_request(picture, last), last_image=path)).result().latents
        for path in (picture, last)
    )
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_model_takes_the_pictures_that_it_was_made_for(
    engine: Engine, i2v_folder: Path, picture: Path, last: Path
) -> None:
    with pytest.raises(RequestError, match="--last-image"):
        engine.plan(a_request(image=picture))
    refused = pytest.raises(RequestError, match="does not take a last image")
    with Engine.open(i2v_folder, device="cpu", vram="200MiB", ram="200MiB") as plain, refused:
        plain.plan(_request(picture, last))
    with pytest.raises(RequestError, match="a last image needs a first image"):
        a_request(last_image=last)


def test_an_encoder_of_other_pictures_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(folder, tmp_path / "m")
    config = wrong / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_seq_len": 32}))
    with pytest.raises(CheckpointError, match="pos_embed"):
        Engine.open(wrong, device="cpu")
