"""A 12-pair version of the held-out score, made by penstock itself with the model's defaults.

What the model does is held here; the gates that it does not reach are expected to fail, so that a
better model makes itself known.  training/README.md has the figures.
"""

from __future__ import annotations

from typing import Any

import pytest

from penstock.engine.demo import MINI
from penstock.engine.engine import Engine
from training.evaluate import make_pairs, score
from training.generate import default_sampler
from training.through_engine import EngineGenerator

LEARNT = ("left", "right", "up", "down", "grow", "shrink", "bounce")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    with Engine.open(MINI, device="cpu") as engine:
        return score(EngineGenerator(engine), make_pairs("test", 12), default_sampler(MINI), 0)


def test_shapes_move_grow_shrink_and_bounce_as_asked(figures: dict[str, Any]) -> None:
    rates = [figures["per_motion"][kind] for kind in LEARNT]
    assert sum(rates) / len(rates) >= 0.9, figures


def test_colour_and_background_are_kept(figures: dict[str, Any]) -> None:
    assert figures["colour"] >= 0.9, figures
    assert figures["background"] >= 0.9, figures


def test_the_video_begins_with_the_picture(figures: dict[str, Any]) -> None:
    assert figures["first_frame_psnr"] >= 25, figures


@pytest.mark.xfail(reason="turns are not learnt well enough", strict=True)
def test_gate_of_all_motions(figures: dict[str, Any]) -> None:
    assert figures["right"] >= 0.9, figures
    assert figures["opposite"] >= 0.9, figures
