"""LoRAs of twelve kinds on plain, int8 and GGUF weights, streamed, resident and packed in: the same
latents as those of a model whose weights their own libraries have merged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.files.reader import WeightReader
from penstock.engine.lora.file import Lora
from penstock.engine.model.files import ModelFiles
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.formats.patched import Patched
from penstock.profiles.manifest import SCRATCH
from penstock.profiles.plan import StreamPlan
from penstock.profiles.planner import minimum_vram_bytes
from penstock.profiles.planner import plan as make_plan
from penstock.units import MIB
from tests.engine.lora import kinds
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _placed, _run

CLOSE = 1e-5
BASES = {"plain": None, "int8": "int8", "gguf": "gguf-q8_0"}


def _request() -> GenerationRequest:
    return GenerationRequest(prompt="a red circle moves", negative_prompt="", width=48, height=32,
                             frames=5, steps=1, seed=7, guidance_scale=1.0)  # fmt: skip


def _latents(folder: Path, loras: list[Lora], *streams: StreamPlan) -> list[Tensor]:
    found = []
    with Engine.open(folder, loras=loras, device="cpu", vram="1GiB", ram="1GiB") as engine:
        plan = engine.plan(_request())
        for stream in streams:
            latents = _run(engine, _request(), _placed(plan, stream, 1), overlapped=True).latents
            assert latents is not None
            found.append(latents)
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    source = locate(folder).streamed
    with WeightReader(source) as reader:
        return {name: reader.read(name, torch.float32) for name in source.shapes}


def _with_weights(folder: Path, weights: Mapping[str, Tensor], made: Path) -> Path:
    """The plain model in ``folder`` with another transformer."""
    shutil.copytree(folder, made)
    (file,) = (made / "transformer").glob("*.safetensors")
    save_file(dict(weights), file)
    return made


@pytest.fixture(scope="module")
def t2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks: two are changed, one is not."""
    return write_tiny_model(
        tmp_path_factory.mktemp("t2v"), image_to_video=False, seed=2, vae={"base_dim": 8},
        transformer={"num_layers": 3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    @cache
    def made(name: str) -> Path:
        if BASES[name] is None:
            return t2v_folder
        folder = tmp_path_factory.mktemp(name) / "packed"
        pack(locate(t2v_folder), str(BASES[name]), folder)
        return folder

    return made


@pytest.fixture(scope="module")
def without(base):  # type: ignore[no-untyped-def]
    """The latents without a LoRA."""
    return cache(lambda name: without_lora(base(name)))


def without_lora(folder: Path) -> Tensor:
    """The latents of a model of three blocks."""
    return _latents(folder, [], StreamPlan(3, 3))[0]


def differences(
    kind: str, folder: Path, plain: Path, without: Tensor, scratch: Path
) -> dict[str, float]:
    """The farthest that latents are from those of merged weights, for each way of using a LoRA, and
    without it.

    Args:
        folder: a model of three blocks, in any format.
        plain: the same model in fp32.
        without: its latents as it is (`without_lora`).
        scratch: an empty folder.
    """
    shapes = locate(folder).streamed.shapes
    made = kinds.make(kind, shapes, kinds.some_modules(shapes))
    strength = 0.8 if kind in kinds.AT_ANY_STRENGTH else 1.0
    lora = Lora(made.write(scratch / "lora.safetensors"), strength, strict=True)
    merged = _with_weights(plain, made.merge(_weights(folder), strength), scratch / "merged")
    count = len([name for name in shapes if name.endswith("attn1.to_q.weight")])
    resident, streamed = StreamPlan(count, count), StreamPlan(count, 1, 1, 2, 2)
    (expected,) = _latents(merged, [], resident)
    found = dict(
        zip(("resident", "streamed"), _latents(folder, [lora], resident, streamed), strict=True)
    )
    pack(locate(folder), "fp32", scratch / "packed", loras=[replace(lora, strict=False)])
    (found["packed in"],) = _latents(scratch / "packed", [], streamed)
    found["without"] = without
    return {way: float((latents - expected).abs().max()) for way, latents in found.items()}


@pytest.mark.parametrize("stored", BASES)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_latents_are_those_of_merged_weights(
    kind: str, stored: str, base, without, t2v_folder: Path, tmp_path: Path
) -> None:
    found = differences(kind, base(stored), t2v_folder, without(stored), tmp_path)
    assert found.pop("without") > 0.01
    assert len(found) == 3
    for way, difference in found.items():
        assert difference <= CLOSE, way


def test_there_are_twelve_kinds_and_those_that_need_the_weight_wrap_its_format(
    t2v_folder: Path, base, tmp_path: Path
) -> None:
    assert len(kinds.KINDS) == 12
    shapes = locate(t2v_folder).streamed.shapes
    for kind in kinds.KINDS:
        made = kinds.make(kind, shapes, kinds.some_modules(shapes))
        lora = Lora(made.write(tmp_path / "lora.safetensors"))
        component = ModelFiles.open(base("int8"), loras=[lora]).transformer
        wrapped = isinstance(component.formats[0]["attn1.to_q"], Patched)
        beside = bool(component.loras[1].deltas)
        sums = kind in ("lora", "differences")
        assert (wrapped, beside) == (not sums and kind not in ("norms", "grown input"), sums)


@pytest.mark.parametrize("kind", ["dora by inputs", "lokr", "boft"])
@pytest.mark.parametrize("stored", ["plain", "int8"])
def test_neither_ledgers_nor_tensors_pass_the_plan(
    kind: str, stored: str, base, tmp_path: Path
) -> None:
    """Their weights are made in the scratch buffer, with a bounded slice in work."""
    folder = base(stored)
    shapes = locate(folder).streamed.shapes
    modules = [*kinds.some_modules(shapes), "condition_embedder.text_embedder.linear_1"]
    made = kinds.make(kind, shapes, modules)
    lora = Lora(made.write(tmp_path / "lora.safetensors"))
    with Engine.open(folder, loras=[lora], device="cpu", vram="1GiB", ram="1GiB") as engine:
        workload, manifest = workload_of(_request()), engine.model.manifest
        roomy = replace(engine.hardware, ram_bytes=64 * MIB)
        least = minimum_vram_bytes(manifest, workload, roomy)
        plan = make_plan(manifest, workload, replace(roomy, vram_bytes=least))
        assert dict(plan["denoise"].work)[SCRATCH] > 0
        with _meter(engine) as meter, _host_buffers_apart(meter):
            result = _run(engine, _request(), plan, overlapped=False)
    assert result.report.peak_vram_bytes <= least
    assert meter.peak <= least + _in_ram(plan)
