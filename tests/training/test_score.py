"""The held-out score, made by penstock itself with the model's defaults: of four pairs, of which
none fails, and in `make faults` of all 48, of which three do (training/README.md)."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.engine.engine import Engine
from penstock.engine.request.demo import MINI
from training.evaluate import make_pairs, score
from training.generate import default_sampler
from training.through_engine import EngineGenerator


@pytest.fixture(scope="module", params=[4, pytest.param(48, marks=pytest.mark.faults)])
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    with Engine.open(MINI, device="cpu") as engine:
        pairs = make_pairs("test", request.param)
        return score(EngineGenerator(engine), pairs, default_sampler(MINI), 0)


def test_colour_and_background_are_kept(figures: dict[str, Any]) -> None:
    assert figures["colour"] >= 0.9, figures
    assert figures["background"] >= 0.9, figures


def test_the_video_begins_with_the_picture(figures: dict[str, Any]) -> None:
    assert figures["first_frame_psnr"] >= 25, figures


def test_what_is_asked_happens_and_so_does_the_opposite(figures: dict[str, Any]) -> None:
    assert figures["right"] >= 0.9, figures
    assert figures["opposite"] >= 0.9, figures
