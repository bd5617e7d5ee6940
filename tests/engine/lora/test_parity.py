"""LoRAs against diffusers' own ``load_lora_weights``, on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.families.wan.defaults import flow_shift
from penstock.engine.files.locate import locate
from penstock.engine.files.reader import WeightReader
from penstock.engine.lora.file import Lora
from penstock.engine.model.files import ModelFiles
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest
from penstock.profiles.plan import StreamPlan
from tests.engine import lora_files as made
from tests.engine.run.test_budget import _placed, _run
from tests.makers import makers_unipc
from tests.versions import needs_loras_of_diffusers

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


def _pipe(folder: Path, image: bool) -> Any:
    pipe = (WanImageToVideoPipeline if image else WanPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _add(pipe: Any, loras: list[Lora]) -> None:
    names = [f"l{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(str(lora.path), adapter_name=name)
    pipe.set_adapters(names, [lora.strength for lora in loras])


def _theirs(folder: Path, image: bool, loras: list[Lora], given: Any) -> tuple[Tensor, Tensor]:
    """With and without the LoRAs."""
    pipe = _pipe(folder, image)
    latents, text, states, timestep = given

    def predict() -> Tensor:
        with torch.no_grad():
            return pipe.transformer(latents, timestep, text, states, return_dict=False)[0]

    plain = predict()
    _add(pipe, loras)
    return predict(), plain


@pytest.mark.parametrize("image", [True, False], ids=["i2v", "t2v"])
@pytest.mark.parametrize("style", STYLES)
def test_the_transformer_is_that_of_diffusers(
    style: str, image: bool, i2v_folder: Path, t2v_folder: Path, tmp_path: Path
) -> None:
    needs_loras_of_diffusers(style)
    folder = i2v_folder if image else t2v_folder
    path = STYLES[style](locate(folder).streamed, tmp_path / "lora.safetensors")
    loras = [Lora(path, 0.7)]
    files = ModelFiles.open(folder, loras=loras)
    given = made.inputs(files.transformer.module.config)
    expected, plain = _theirs(folder, image, loras, given)
    assert (expected - plain).abs().max() > 0.1
    assert (made.ours(files, given, chunk=5) - expected).abs().max() <= CLOSE
    pack(locate(folder), "fp32", tmp_path / "merged", loras=loras)
    merged = ModelFiles.open(tmp_path / "merged")
    assert not merged.loras.given
    assert (made.ours(merged, given, chunk=5) - expected).abs().max() <= CLOSE


def test_several_at_once_add_up(i2v_folder: Path, tmp_path: Path) -> None:
    source = locate(i2v_folder).streamed
    loras = [
        Lora(_kohya(source, tmp_path / "a.safetensors"), 0.5),
        Lora(_comfy(source, tmp_path / "b.safetensors"), -0.25),
        Lora(_diffusers(source, tmp_path / "c.safetensors"), 1.5),
    ]
    files = ModelFiles.open(i2v_folder, loras=loras)
    given = made.inputs(files.transformer.module.config)
    expected, _ = _theirs(i2v_folder, True, loras, given)
    assert (made.ours(files, given, chunk=100) - expected).abs().max() <= CLOSE
    pack(locate(i2v_folder), "fp32", tmp_path / "merged", loras=loras)
    merged = ModelFiles.open(tmp_path / "merged")
    assert (made.ours(merged, given, chunk=100) - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("stored", ["int8", "gguf-q8_0"])
def test_beside_quantised_weights(stored: str, t2v_folder: Path, tmp_path: Path) -> None:
    """diffusers on the decoded weights, with the LoRA as it loads it."""
    needs_loras_of_diffusers("lightx2v")
    path = _lightx2v(locate(t2v_folder).streamed, tmp_path / "lora.safetensors")
    pack(locate(t2v_folder), stored, tmp_path / "packed")
    files = ModelFiles.open(tmp_path / "packed", loras=[Lora(path, 0.7)])
    assert {fmt.name for fmt in files.transformer.formats[0].values()} == {stored}
    pipe = _pipe(t2v_folder, False)
    with WeightReader(files.transformer.source) as reader:
        names = files.transformer.source.shapes
        pipe.transformer.load_state_dict({n: reader.read(n, torch.float32) for n in names})
    _add(pipe, [Lora(path, 0.7)])
    latents, text, states, timestep = made.inputs(files.transformer.module.config)
    with torch.no_grad():
        (expected,) = pipe.transformer(latents, timestep, text, states, return_dict=False)
    found = made.ours(files, (latents, text, states, timestep), chunk=9)
    assert (found - expected).abs().max() <= CLOSE


def _request(picture: Path) -> GenerationRequest:
    return GenerationRequest(
        prompt="a red circle moves", negative_prompt="blurry", image=picture,
        width=64, height=48, frames=5, steps=3, seed=7, clip_crop="center", fit="stretch",
    )  # fmt: skip


def _their_latents(folder: Path, request: GenerationRequest, loras: list[Lora]) -> Tensor:
    pipe = _pipe(folder, True)
    _add(pipe, loras)
    pipe.scheduler = makers_unipc(
        pipe.scheduler.config, flow_shift(request.width, request.height, request.shift)
    )
    frames: Tensor = pipe(
        image=Image.open(request.image).convert("RGB"),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames
    return frames


@pytest.mark.parametrize("style", STYLES)
def test_the_latents_of_a_job_are_those_of_diffusers(
    style: str, i2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    """Unmerged and merged, streamed from disk and resident."""
    needs_loras_of_diffusers(style)
    path = STYLES[style](locate(i2v_folder).streamed, tmp_path / "lora.safetensors")
    loras, request = [Lora(path, 0.6)], _request(picture)
    expected = _their_latents(i2v_folder, request, loras)
    pack(locate(i2v_folder), "fp32", tmp_path / "merged", loras=loras)
    for folder, given in ((i2v_folder, loras), (tmp_path / "merged", [])):
        with Engine.open(folder, loras=given, device="cpu", vram="1GiB", ram="1GiB") as engine:
            plan, count = engine.plan(request), len(engine.model.transformer.blocks)
            for stream in (StreamPlan(count, count), StreamPlan(count, 1, 1, 2, 2)):
                found = _run(engine, request, _placed(plan, stream), overlapped=True).latents
                assert found is not None
                assert (found - expected).abs().max() <= CLOSE
