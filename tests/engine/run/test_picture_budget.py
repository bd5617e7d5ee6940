"""A large picture is counted: in the plan, in the ledger while it is decoded, and in a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from penstock.engine.families.wan import work
from penstock.engine.media.picture import measure
from penstock.engine.run.stage import Stage
from penstock.errors import OverBudget
from penstock.units import MIB
from tests.engine.running import a_request, an_engine

SIDE = 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit grey picture of 4 megapixels in some kilobytes."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    Image.new("I;16", (SIDE, SIDE), 40_000).save(path)
    return path


def test_the_plan_holds_the_picture(i2v_folder: Path, picture: Path, large: Path) -> None:
    with an_engine(i2v_folder) as engine:
        small, grown = (engine.plan(a_request(image=each)) for each in (picture, large))
    taken = [dict(plan["image"].ram_work)["picture"] for plan in (small, grown)]
    assert taken[1] >= measure(large).decode_bytes >= 8 * SIDE * SIDE
    assert taken[0] < 2 * MIB
    # Afterwards only the picture at the video's size is left
    assert small["encode"].ram_bytes == grown["encode"].ram_bytes


def test_a_picture_that_does_not_fit_is_refused_before_it_is_decoded(
    i2v_folder: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with an_engine(i2v_folder, ram="20MiB") as engine, pytest.raises(OverBudget) as caught:
        engine.submit(a_request(image=large))
    assert caught.value.resource == "RAM"
    assert caught.value.consumers[0][0] == "image: picture"


def test_it_is_decoded_inside_its_reservation(
    i2v_folder: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    original = work.see_picture

    def seen(stage: Stage, path: Path) -> object:
        held.append(stage.host_ledger.used)
        return original(stage, path)

    monkeypatch.setattr(work, "see_picture", seen)
    with an_engine(i2v_folder) as engine:
        plan = engine.plan(a_request(image=large))
        result = engine.submit(a_request(image=large)).result()
    assert len(held) == 1
    assert held[0] >= measure(large).decode_bytes
    assert result.report.peak_ram_bytes <= plan.peak_ram_bytes


def test_the_video_is_the_same_whatever_room_there_was(
    i2v_folder: Path, large: Path, tmp_path: Path
) -> None:
    """16 bits of grey are those 8 that they round to."""
    plain = tmp_path / "plain.png"
    Image.new("L", (SIDE, SIDE), round(40_000 / 257)).save(plain)
    with an_engine(i2v_folder) as engine:
        found = [engine.submit(a_request(image=each)).result() for each in (large, plain)]
    assert torch.equal(found[0].latents, found[1].latents)
