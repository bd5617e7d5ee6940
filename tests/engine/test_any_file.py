"""Files of every format and naming run to the same latents as the plain model of their values."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.engine import Engine
from penstock.engine.locate import Files, locate
from penstock.engine.pack import pack
from penstock.engine.report import JobResult
from penstock.engine.request import GenerationRequest
from penstock.errors import CheckpointError
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from penstock.units import MIB
from tests.engine import golden
from tests.engine.test_budget import _run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


def a_request(**changes: Any) -> GenerationRequest:
    request = GenerationRequest(
        prompt="a red circle",
        negative_prompt="",
        width=48,
        height=32,
        frames=5,
        steps=2,
        seed=3,
        guidance_scale=1.0,
    )
    return replace(request, **changes)


def opened(model: Path, files: Files | None = None, **options: Any) -> Engine:
    return Engine.open(model, files=files, device="cpu", vram="256MiB", ram="256MiB", **options)


def latents_of(model: Path, files: Files | None = None, **options: Any) -> JobResult:
    with opened(model, files, **options) as engine:
        return engine.submit(a_request()).result()


def plain_twin(
    model: Path, part: str, values: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path
) -> Path:
    """``model`` with one part replaced by plain ``values``."""
    shutil.copytree(model, folder)
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    stem = "model" if part.endswith("encoder") else "diffusion_pytorch_model"
    tensors = {name: value.to(dtype).contiguous() for name, value in values.items()}
    save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
    return folder


SPELLINGS = {
    "bf16": ("bf16", torch.bfloat16), "fp16": ("fp16", torch.float16),
    "fp32": ("fp32", torch.float32), "raw fp8": ("fp8", torch.bfloat16),
    "everything fp8": ("fp8", torch.bfloat16), "comfy old": ("fp8", torch.bfloat16),
    "comfy new": ("fp8", torch.bfloat16), "comfy metadata": ("fp8", torch.bfloat16),
    "comfy int8": ("int8", torch.bfloat16), "lightx2v int8": ("int8", torch.bfloat16),
    "lightx2v fp8": ("fp8", torch.bfloat16), "quanto int8": ("quanto-int8", torch.bfloat16),
    "quanto fp8": ("quanto-fp8", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_transformers_file_of_every_spelling(tmp_path: Path, model: Path, spelling: str) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, spelling, "model.diffusion_model.")
    file = made.save(tmp_path / "wan.safetensors")
    label, dtype = SPELLINGS[spelling]
    twin = plain_twin(model, "transformer", made.values, dtype, tmp_path / "twin")
    found = latents_of(model, Files(transformer=file))
    assert found.report.weight_format == label
    assert torch.equal(found.latents, latents_of(twin).latents)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "F16"])
def test_a_gguf_transformer(tmp_path: Path, model: Path, kind: str) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    values = golden.write_gguf(tmp_path / "x.gguf", tensors, names, kind, "wan")
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    twin = plain_twin(model, "transformer", values, dtype, tmp_path / "twin")
    found = latents_of(model, Files(transformer=tmp_path / "x.gguf"))
    assert found.report.weight_format == ("fp16" if kind == "F16" else f"gguf-{kind.lower()}")
    assert torch.equal(found.latents, latents_of(twin).latents)


@pytest.mark.parametrize("storage", ["gguf", "comfy old", "everything fp8"])
def test_a_quantised_text_encoder_and_its_table(tmp_path: Path, model: Path, storage: str) -> None:
    tensors = golden.load(model, "text_encoder")
    if storage == "gguf":
        file, names = tmp_path / "t5.gguf", golden.llama_names(list(tensors))
        values = golden.write_gguf(file, tensors, names, "Q8_0", "t5encoder")
    else:
        names = golden.original_names("text_encoder", list(tensors))
        made = golden.make(tensors, names, storage)
        file, values = made.save(tmp_path / "t5.safetensors"), made.values
    twin = plain_twin(model, "text_encoder", values, torch.bfloat16, tmp_path / "twin")
    files = Files(text_encoder=file, tokenizer=model / "tokenizer")
    assert torch.equal(latents_of(model, files).latents, latents_of(twin).latents)


@pytest.fixture(scope="module", params=["int8", "nf4", "fp8"])
def packed(request: pytest.FixtureRequest, model: Path, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("packed") / request.param
    pack(locate(model), request.param, folder)
    return folder


def placed(plan: Plan, stream: StreamPlan) -> Plan:
    def place(phase: PhasePlan) -> PhasePlan:
        return replace(phase, stream=stream) if phase.name == "denoise" else phase

    return replace(plan, phases=tuple(map(place, plan.phases)))


def test_streamed_is_resident_bit_for_bit(packed: Path) -> None:
    streams = [StreamPlan(2, 2, 0), StreamPlan(2, 0, 0, 1, 1), StreamPlan(2, 1, 0, 1, 1),
               StreamPlan(2, 0, 1, 2, 1)]  # fmt: skip
    with opened(packed) as engine:
        request = a_request()
        plan = engine.plan(request)
        results = [
            _run(engine, request, placed(plan, stream), overlapped)
            for stream in streams
            for overlapped in (True, False)
        ]
    assert all(torch.equal(each.latents, results[0].latents) for each in results[1:])


def test_a_pack_is_smaller_and_says_so(model: Path, packed: Path) -> None:
    with opened(model) as whole, opened(packed) as engine:
        plan = engine.plan(a_request())
        assert plan.weight_format == packed.name
        ratio = {"int8": 0.52, "fp8": 0.52, "nf4": 0.30}[packed.name]
        plain = whole.model.manifest.transformer.weights
        weights = engine.model.manifest.transformer.weights
        assert sum(weights.block_bytes) < ratio * sum(plain.block_bytes)
        labels = dict(plan["denoise"].work)
        assert labels["dequantisation scratch"] == 2 * 256 * 512


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


RUNS = ["block 0", "block 1", "cross 1", "rest"]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_a_flipped_bit_is_found_before_the_block_is_used(
    tmp_path: Path, model: Path, packed: Path, run: str, resident: int
) -> None:
    folder = shutil.copytree(packed, tmp_path / "p")
    with opened(folder) as engine:
        packs = engine.model.transformer.packs
    (path,) = packs.runs
    place = next(each for each in packs.runs[path].values() if each.name == run)
    flip(path, place.offset + place.nbytes // 2)
    stream = StreamPlan(2, resident, 0, 2 - resident and 1, 2 - resident and 1)
    with opened(folder) as engine:
        request = a_request()
        with pytest.raises(CheckpointError, match=f"damaged.*the bytes of {run} "):
            _run(engine, request, placed(engine.plan(request), stream), True)


def test_a_flipped_bit_in_the_embedding_is_found(tmp_path: Path, packed: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "p")
    with opened(folder) as engine:
        packs = engine.model.text.packs
    (path,) = packs.runs
    place = next(each for each in packs.runs[path].values() if each.name == "embedding")
    flip(path, place.offset + place.nbytes - 1)
    with opened(folder) as engine, pytest.raises(CheckpointError, match="the bytes of embedding"):
        engine.submit(a_request()).result()


def test_the_first_use_packs_into_the_cache_and_the_second_reads(
    tmp_path: Path, model: Path
) -> None:
    whole = latents_of(shutil.copytree(model, tmp_path / "m"), format="nf4", cache=tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    assert folder.name.startswith("nf4-")
    assert any("packed the transformer as nf4" in told for told in whole.report.notices)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = latents_of(tmp_path / "m", format="nf4", cache=tmp_path / "c")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert any("read from its pack" in told for told in again.report.notices)
    assert again.report.weight_format == "nf4"
    assert torch.equal(again.latents, whole.latents)


def test_what_is_stored_in_the_format_is_not_copied(tmp_path: Path, model: Path) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    file = golden.make(tensors, names, "comfy old").save(tmp_path / "x.safetensors")
    found = latents_of(model, Files(transformer=file), format="fp8", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert found.report.weight_format == "fp8"


def test_compute_fast_is_probed_and_told(packed: Path) -> None:
    with opened(packed, compute="fast") as engine:
        working = engine.model.opening.working
        fast = engine.submit(a_request()).result()
    exact = latents_of(packed)
    assert exact.report.compute == "exact"
    assert fast.report.compute.startswith("fast")
    assert sum("8-bit products in" in told for told in fast.report.notices) == 2
    used = packed.name in working
    assert (f"{packed.name}" in fast.report.compute) == used
    assert torch.equal(fast.latents, exact.latents) != used
    assert (
        torch.nn.functional.cosine_similarity(
            fast.latents.flatten(), exact.latents.flatten(), dim=0
        )
        > 0.99
    )


def test_budgets_hold_for_packs(packed: Path) -> None:
    with opened(packed) as engine:
        result = engine.submit(a_request()).result()
        plan = engine.plan(a_request())
        for phase, promised in zip(result.report.phases, plan.phases, strict=False):
            assert phase.measured_vram_bytes <= promised.vram_bytes
        assert result.report.peak_vram_bytes <= 256 * MIB
