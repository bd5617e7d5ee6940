"""What is left open takes what the model was released with, then what its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.engine import Engine
from penstock.engine.families.wan.builtin import wan21_i2v_14b
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.model.grid import Grid
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import Settings, resolve

I2V = wan21_i2v_14b("bf16")
T2V = replace(I2V, transformer=replace(I2V.transformer, in_channels=16, image_dim=None), image=None)
SMALL = replace(T2V, transformer=replace(T2V.transformer, num_attention_heads=12))


@dataclass(frozen=True)
class _Model:
    official: WanManifest
    defaults: Mapping[str, Any] = field(default_factory=dict)
    grid: Grid = field(default_factory=Grid)
    origin: str = "a model"


def _resolved(model: _Model, **given: Any) -> GenerationRequest:
    return resolve(Settings(prompt="a cat", **given), model)


def _said(request: GenerationRequest) -> tuple[int, int, int, float, float | None]:
    return request.width, request.height, request.steps, request.guidance_scale, request.shift


@pytest.mark.parametrize(
    ("official", "given", "expected"),
    [
        (I2V, {}, (1280, 720, 40, 5.0, 5.0)),
        (I2V, {"size": "832x480"}, (832, 480, 40, 5.0, 3.0)),
        (I2V, {"size": "480x832"}, (480, 832, 40, 5.0, 3.0)),
        (I2V, {"size": "960x528"}, (960, 528, 40, 5.0, 5.0)),
        (T2V, {}, (1280, 720, 50, 5.0, 5.0)),
        (T2V, {"size": "832x480"}, (832, 480, 50, 5.0, 5.0)),
        (SMALL, {}, (832, 480, 50, 6.0, 8.0)),
        (SMALL, {"size": "1280x720"}, (1280, 720, 50, 6.0, 8.0)),
        (SMALL, {"max_area": "720p"}, (1248, 720, 50, 6.0, 8.0)),
        (SMALL, {"steps": 9, "guidance_scale": 2.0, "shift": 4.0}, (832, 480, 9, 2.0, 4.0)),
        (SMALL, {"distilled": True}, (832, 480, 4, 1.0, 5.0)),
    ],
)
def test_each_model_has_its_makers_defaults(
    official: WanManifest, given: dict[str, Any], expected: tuple[int, int, int, float, float]
) -> None:
    assert _said(_resolved(_Model(official), **given)) == expected


def test_the_folder_wins_over_the_makers_and_the_request_over_both() -> None:
    model = _Model(SMALL, {"width": 64, "steps": 12, "shift": 2.5})
    assert _said(_resolved(model)) == (64, 480, 12, 6.0, 2.5)
    assert _said(_resolved(model, steps=3, shift=7)) == (64, 480, 3, 6.0, 7.0)


def test_a_description_and_a_models_files_say_the_same(t2v_folder: Path) -> None:
    described = Prepared.open(synthetic="wan2.1-i2v-14b", device="cpu").about
    assert _said(resolve(Settings(prompt="a cat"), described)) == (1280, 720, 40, 5.0, 5.0)
    with Engine.open(t2v_folder, device="cpu") as engine:
        small = resolve(Settings(prompt="a cat", size="64x48"), engine.model)
        assert _said(small) == (64, 48, 50, 5.0, 5.0)
        assert engine.model.flow_shift(64, 48, None) == 5.0
