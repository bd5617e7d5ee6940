"""Pictures of another aspect than the video's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.families.wan import clip as pictures
from penstock.engine.media.fit import fitting
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run import stored
from penstock.engine.store.journal import Journal
from penstock.errors import RequestError


def _halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right; a green band above and below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    pixels[: height // 8] = pixels[-(height // 8) :] = (0, 255, 0)
    return Image.fromarray(pixels)


def _frame(picture: Image.Image, size: tuple[int, int], fit: str) -> tuple[np.ndarray, str]:
    """The frame in 8 bits, (h, w, 3), and what was told."""
    found = fitting(picture.size, size, fit, 16)
    frame = pictures.preprocess(picture, *size, found)
    assert frame.shape == (1, 3, size[1], size[0]) and frame.is_contiguous()
    pixels = ((frame[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return pixels, found.told


def test_a_crop_keeps_the_middle_and_every_shape() -> None:
    picture = _halves(400, 400)
    made, told = _frame(picture, (320, 160), "crop")
    assert (made[:, :158, 0] == 255).all() and not made[:, :158, 1].any()  # no band is left
    assert "cropped to 400x200 around its middle" in told and "--fit pad" in told
    tall, told = _frame(picture, (160, 320), "crop")
    assert tall[5, 80, 1] == 255  # the bands are, the outer halves are not
    assert "cropped to 200x400" in told
    cut = picture.crop((100, 0, 300, 400)).resize((160, 320), Image.Resampling.LANCZOS)
    assert np.abs(tall[:, 4:-4].astype(int) - np.array(cut)[:, 4:-4]).max() <= 1


def test_padding_keeps_all_of_it_within_black() -> None:
    made, told = _frame(_halves(400, 400), (320, 160), "pad")
    assert not made[:, :80].any() and not made[:, 240:].any()
    assert made[5, 160, 1] == 255 and made[80, 90, 0] == 255
    assert np.array_equal(made[:, 80:240], np.array(_halves(400, 400).resize((160, 160), 1)))
    assert "padded with black" in told


def test_stretching_is_the_plain_resize_and_says_so() -> None:
    picture = _halves(400, 400)
    made, told = _frame(picture, (320, 160), "stretch")
    assert np.array_equal(made, np.array(picture.resize((320, 160), Image.Resampling.LANCZOS)))
    assert "stretched" in told


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(832, 464), (1280, 720), (848, 480)])
def test_the_rounding_of_sides_is_no_other_aspect(fit: str, size: tuple[int, int]) -> None:
    found = fitting((1920, 1080), size, fit, 16)
    assert (found.box, found.inner, found.place, found.told) == (None, size, (0, 0), "")


def test_a_request_names_a_way_that_is_known() -> None:
    with pytest.raises(RequestError, match="crop or pad or stretch"):
        GenerationRequest(prompt="a cat", fit="squash")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "wide.png"
    _halves(400, 100).save(path)
    return path


def test_a_job_crops_and_tells_and_its_condition_is_that_of_the_cropped_picture(
    i2v_folder: Path, wide: Path
) -> None:
    request = GenerationRequest(prompt="a", negative_prompt="", image=wide, width=64, height=48,
                                frames=5, steps=1, seed=1, guidance_scale=1.0)  # fmt: skip
    latents = {}
    with Engine.open(i2v_folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        for fit in ("crop", "stretch"):
            done = engine.submit(GenerationRequest(**(vars(request) | {"fit": fit}))).result()
            assert any("--fit" in notice and "400x100" in notice for notice in done.report.notices)
            latents[fit] = done.latents
        seen: list[torch.Tensor] = []
        original = pictures.preprocess
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pictures, "preprocess", lambda *a: seen.append(original(*a)) or seen[-1])
            engine.submit(request).result()
    assert torch.equal(
        seen[0], original(Image.open(wide), 64, 48, fitting((400, 100), (64, 48), "crop", 16))
    )
    assert not torch.equal(seen[0], original(Image.open(wide), 64, 48))
    assert not torch.equal(latents["crop"], latents["stretch"])


def test_a_record_from_before_is_stretched(
    i2v_folder: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(prompt="a", image=wide, width=64, height=48, frames=5)
    with Engine.open(i2v_folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        values = stored.request_values(request, engine.model.opening, engine.plan(request))
    journal = Journal.create(tmp_path / "job", values, {}, {}, facts={}, picture=wide.read_bytes())
    assert stored.restored_request(journal).fit == "crop"
    del journal.record.request["fit"]
    assert stored.restored_request(journal).fit == "stretch"
    journal.close()
