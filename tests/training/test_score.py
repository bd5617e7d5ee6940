"""A 12-pair version of the held-out score on the shipped model."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from training.evaluate import make_pairs, score
from training.generate import Sampler, from_folder

FOLDER = Path(__file__).parents[2] / "penstock" / "assets" / "mini"


@pytest.mark.xfail(reason="the shipped model is under-trained, see training/README.md", strict=True)
def test_twelve_pairs() -> None:
    defaults = json.loads((FOLDER / "defaults.json").read_text())
    sampler = Sampler(**{name: defaults[name] for name in asdict(Sampler())})
    figures = score(from_folder(FOLDER), make_pairs("test", 12), sampler, seed=0)
    assert float(str(figures["right"])) >= 0.75
    assert float(str(figures["opposite"])) >= 0.75
    assert float(str(figures["first_frame_psnr"])) >= 25
