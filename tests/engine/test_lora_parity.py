"""LoRAs against diffusers' own ``load_lora_weights``, on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from penstock.engine.locate import locate
from penstock.engine.lora import Lora
from penstock.engine.model import ModelFiles
from tests.engine import lora_files as made

CLOSE = 1e-5


def _diffusers(source: Any, path: Path) -> Path:
    modules = made.linears(source, outside=False) + made.linears(source, outside=True)
    return made.write_diffusers(path, made.pairs(source, modules))


def _peft_alpha(source: Any, path: Path) -> Path:
    """Another alpha than the rank, and one layer with its own, told in the header."""
    modules = made.linears(source, outside=False)
    names = [*dict.fromkeys(module.split(".", 2)[2] for module in modules)]
    config = {
        "transformer.r": 3,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 1},
        "transformer.rank_pattern": {},
        "transformer.target_modules": names,
        "transformer.use_rslora": True,
    }
    metadata = {"lora_adapter_metadata": json.dumps(config), "format": "pt"}
    return made.write_diffusers(path, made.pairs(source, modules), metadata)


def _kohya(source: Any, path: Path) -> Path:
    return made.write_kohya(path, made.pairs(source, made.linears(source, outside=False)))


def _comfy(source: Any, path: Path) -> Path:
    modules = made.linears(source, outside=False) + made.linears(source, outside=True)
    return made.write_comfy(path, made.pairs(source, modules))


def _comfy_alpha(source: Any, path: Path) -> Path:
    return made.write_comfy(path, made.pairs(source, made.linears(source, outside=False)), 1.5)


def _lightx2v(source: Any, path: Path) -> Path:
    modules = made.linears(source, outside=False) + made.linears(source, outside=True)
    draw = torch.Generator().manual_seed(5)
    head = 0.1 * torch.randn(source.shapes["proj_out.weight"], generator=draw)
    low_rank = made.pairs(source, [module for module in modules if module != "proj_out"])
    diffs = {"head.head.diff": head}
    return made.write_lightx2v(path, low_rank, made.biases(source, modules), **diffs)


STYLES: dict[str, Callable[[Any, Path], Path]] = {
    "diffusers": _diffusers,
    "peft alpha": _peft_alpha,
    "kohya": _kohya,
    "comfy": _comfy,
    "comfy alpha": _comfy_alpha,
    "lightx2v": _lightx2v,
}


def _theirs(folder: Path, image: bool, loras: list[Lora], given: Any) -> tuple[Tensor, Tensor]:
    """With and without the LoRAs."""
    pipe = (WanImageToVideoPipeline if image else WanPipeline).from_pretrained(folder)
    latents, text, states, timestep = given

    def predict() -> Tensor:
        with torch.no_grad():
            return pipe.transformer(latents, timestep, text, states, return_dict=False)[0]

    plain = predict()
    names = [f"l{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(str(lora.path), adapter_name=name)
    pipe.set_adapters(names, [lora.strength for lora in loras])
    return predict(), plain


@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
@pytest.mark.parametrize("style", STYLES)
def test_the_transformer_is_that_of_diffusers(
    style: str, image: bool, i2v_folder: Path, t2v_folder: Path, tmp_path: Path
) -> None:
    folder = i2v_folder if image else t2v_folder
    path = STYLES[style](locate(folder).transformer, tmp_path / "lora.safetensors")
    loras = [Lora(path, 0.7)]
    files = ModelFiles.open(folder, loras=loras)
    given = made.inputs(files.transformer.module.config)
    expected, plain = _theirs(folder, image, loras, given)
    found = made.ours(files, given, chunk=5)
    assert not torch.allclose(expected, plain, rtol=0.05, atol=0.05)
    assert (found - expected).abs().max() <= CLOSE
