"""What the image encoder sees of the picture is the request's to say, and part of a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.families.wan.clip import squashed_values
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.stored import restored_request
from penstock.engine.store.journal import Journal
from penstock.errors import RequestError
from tests.engine.running import a_request, an_engine, stop_after_a_step
from tests.meter import StorageMeter

CENTRE = {"clip_crop": "center"}


def test_the_crop_changes_the_video_and_nothing_else_does(i2v_folder: Path, picture: Path) -> None:
    request = a_request(image=picture)
    with an_engine(i2v_folder) as engine:
        assert resolve(Settings("a cat", image=picture), engine.model).clip_crop == "squash"
        squashed, again, cropped = (
            engine.submit(each).result().latents
            for each in (
                request,
                replace(request, clip_crop="squash"),
                a_request(image=picture, **CENTRE),
            )
        )
    assert torch.equal(squashed, again)
    assert not torch.equal(squashed, cropped)


def test_a_kept_job_goes_on_with_its_own_crop(
    i2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    request = a_request(image=picture, **CENTRE)
    with an_engine(i2v_folder) as engine:
        whole = engine.submit(request).result().latents
        stop_after_a_step(engine, request, tmp_path / "job")
        with Journal.open(tmp_path / "job") as journal:
            assert restored_request(journal).clip_crop == "center"
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, whole)


def test_an_unknown_crop_is_refused() -> None:
    with pytest.raises(RequestError, match="expected squash or center, found 'left'"):
        a_request(clip_crop="left")


@pytest.mark.parametrize("size", [(160, 4000), (4000, 160), (900, 900)], ids=str)
def test_squashing_stays_inside_what_is_planned(
    size: tuple[int, int], i2v_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise(size, 80).convert("RGB").save(path)
    with an_engine(i2v_folder) as engine:
        planned = dict(engine.plan(a_request(image=path))["image"].ram_work)["picture"]
        config = dict(engine.model.source.image_processor)
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    with StorageMeter() as meter:
        squashed_values(config, picture, 32)
    assert meter.peak <= planned - 4 * size[0] * size[1]


@pytest.mark.parametrize(
    ("words", "expected"), [((), None), (("--clip-crop", "center"), "center")], ids=str
)
def test_the_flag_is_the_requests(
    words: tuple[str, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("penstock.cli.main._generate", lambda *given: seen.append(given))
    found = CliRunner().invoke(app, ["generate", "--prompt", "x", "-o", "x.mp4", *words])
    assert found.exit_code == 0, found.output
    assert [each for each in seen[0] if isinstance(each, Settings)][0].clip_crop == expected
    refused = CliRunner().invoke(
        app, ["generate", "--prompt", "x", "-o", "x.mp4", "--clip-crop", "l"]
    )
    assert refused.exit_code == 2
