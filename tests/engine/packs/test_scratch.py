"""What decoding takes is an item of the plan, reserved by phase, and no more is ever alive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.blocks import PAGE_BYTES, TENSOR_ALIGNMENT
from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files, locate
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.profiles.manifest import SCRATCH
from penstock.profiles.plan import Plan
from penstock.profiles.planner import minimum_vram_bytes
from penstock.profiles.planner import plan as make_plan
from penstock.units import MIB
from tests.engine import golden
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run

REQUEST = GenerationRequest(
    prompt="a red circle", negative_prompt="", width=32, height=32, frames=1, steps=1, seed=3,
    guidance_scale=1.0,
)  # fmt: skip
KINDS = ("int8", "fp8", "nf4", "quanto-int4", "gguf-q8_0", "raw fp8", "Q8_0 everywhere")
FF, ATTENTION = 2 * 256 * 512, 2 * 256 * 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("quantised")
    files = Files()
    if request.param == "Q8_0 everywhere":
        for part, arch in (("transformer", "wan"), ("text_encoder", "t5encoder")):
            tensors = golden.load(model, part)
            names = (
                golden.original_names(part, list(tensors))
                if arch == "wan"
                else golden.llama_names(list(tensors))
            )
            golden.write_gguf(folder / f"{part}.gguf", tensors, names, "Q8_0", arch)
        files = Files(
            transformer=folder / "transformer.gguf",
            text_encoder=folder / "text_encoder.gguf",
            tokenizer=model / "tokenizer",
        )
    elif request.param == "raw fp8":
        tensors = golden.load(model, "transformer")
        names = golden.original_names("transformer", list(tensors))
        stored = golden.make(tensors, names, "everything fp8")
        files = Files(transformer=stored.save(folder / "x.safetensors"))
    else:
        model = pack(locate(model), request.param, folder / "p").folder
    with Engine.open(model, files=files, device="cpu", vram="256MiB", ram="256MiB") as opened:
        yield opened


def least_plan(engine: Engine) -> Plan:
    """The smallest: nothing hides behind what is resident."""
    manifest, workload = engine.model.manifest, workload_of(REQUEST)
    roomy = replace(engine.hardware, ram_bytes=64 * MIB)
    least = minimum_vram_bytes(manifest, workload, roomy)
    return make_plan(manifest, workload, replace(roomy, vram_bytes=least))


def test_scratch_is_planned_where_it_is_used_and_nowhere_else(engine: Engine) -> None:
    plan = least_plan(engine)
    scratch = {phase.name: dict(phase.work).get(SCRATCH, 0) for phase in plan.phases}
    assert scratch["denoise"] == FF
    assert scratch["context"] == ATTENTION
    assert scratch["decode"] == scratch["mux"] == 0
    quantised_text = engine.model.text.source.label() == "gguf-q8_0"
    assert scratch["text"] == (2 * 64 * 128 if quantised_text else 0)


def test_no_more_is_alive_than_the_plan_reserves(engine: Engine) -> None:
    plan = least_plan(engine)
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = _run(engine, REQUEST, plan, overlapped=True)
    assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
    assert engine.model.scratch.nbytes == 0
    for phase in result.report.phases:
        if phase.name != "mux":
            assert 0.9 * phase.predicted_vram_bytes <= phase.measured_vram_bytes
            assert phase.measured_vram_bytes <= phase.predicted_vram_bytes


def test_the_meter_sees_scratch_that_was_not_planned(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail: twice the buffer is more than was promised."""
    plan = least_plan(engine)
    scratch, held = engine.model.scratch, type(engine.model.scratch).held
    monkeypatch.setattr(
        type(scratch), "held", lambda self, nbytes: held(self, nbytes + plan.peak_vram_bytes)
    )
    with _meter(engine) as meter, _host_buffers_apart(meter):
        _run(engine, REQUEST, plan, overlapped=False)
    assert meter.peak > plan.peak_vram_bytes + _in_ram(plan)


def test_tensors_that_are_cast_are_reserved(tmp_path: Path, model: Path) -> None:
    """GGUF keeps norms, biases and tables in fp32, and the patch embedding is decoded at load."""
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    golden.write_gguf(tmp_path / "x.gguf", tensors, names, "Q8_0", "wan")
    files = Files(transformer=tmp_path / "x.gguf")
    with Engine.open(model, files=files, device="cpu", vram="64MiB", ram="64MiB") as engine:
        component = engine.model.transformer
        storage = engine.model.manifest.transformer.storage
        assert storage.cast_bytes > 0
        rest = engine.model.manifest.transformer.weights.rest_bytes
        assert component.dtype == torch.bfloat16
        outside = {n: t.numel() for n, t in tensors.items() if not n.startswith("blocks.")}
        # Every tensor outside the blocks is there in fp32 and, but for the table that is added in
        # fp32, once more as the network computes; tensors and the whole are aligned.
        stored, padding = 4 * sum(outside.values()), TENSOR_ALIGNMENT * len(outside)
        assert stored <= component.rest.nbytes <= stored + padding + PAGE_BYTES
        cast = 2 * (sum(outside.values()) - outside["scale_shift_table"])
        assert rest == component.rest.nbytes + cast
        assert engine.submit(REQUEST).result().latents.isfinite().all()
