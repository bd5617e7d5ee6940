"""Hidden states in fp32 beside 16-bit weights: what they gain, and that a job keeps to its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_dit import fake_transformer
from benchmarks.residual import errors
from penstock.engine.engine import Engine
from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost import transformer as cost
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.stored import restored_plan
from penstock.engine.store.journal import Journal
from penstock.errors import FingerprintMismatch
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.quant.delta import Delta
from penstock.quant.lora import LoraLinear
from penstock.quant.paths import Computing, Scratch
from tests.engine.families.wan.cost.test_transformer import spec_of
from tests.engine.running import a_request, an_engine, stop_after_a_step
from tests.meter import StorageMeter
from tests.tiny_transformer import inputs, tiny_transformer

STEP = torch.tensor([713])
WIDE = torch.float32


def test_the_error_of_a_forward_does_not_grow_with_its_blocks() -> None:
    few, many = errors(2), errors(40)
    assert many["fp32"] <= 3e-3 and many["fp32"] <= 2 * few["fp32"]
    assert many["bf16"] >= 3 * few["bf16"] >= 3e-3  # as diffusers, and with it attach, compute it


def a_pass(
    model: Any, chunk: int, residual: torch.dtype | None, texts: int = 1
) -> list[torch.Tensor]:
    dtype = model.patch_embedding.weight.dtype
    latents, text, _ = inputs(model, (3, 8, 10), dtype)
    context = forward.prepare_context(model, text, None)
    cross = [forward.cross_kv(block.attn2, context) for block in model.blocks]
    step = forward.step_modulation(model, STEP, dtype, residual)[0]
    rope = forward.rope_tables(model, (3, 8, 10), latents.device)
    return forward.denoise_forward(
        model, enumerate(model.blocks), latents, [cross] * texts, step, rope, chunk,
        residual=residual,
    )  # fmt: skip


def test_fp32_weights_compute_the_same_to_the_bit() -> None:
    model = tiny_transformer()
    assert torch.equal(a_pass(model, 7, WIDE)[0], a_pass(model, 7, None)[0])


def test_predictions_are_fp32_and_branches_are_apart() -> None:
    model = tiny_transformer(dtype=torch.bfloat16)
    (one,), both = a_pass(model, 60, WIDE), a_pass(model, 60, WIDE, texts=2)
    assert one.dtype == WIDE and all(torch.equal(one, each) for each in both)
    assert not torch.equal(one.bfloat16(), a_pass(model, 60, None)[0])


def test_layers_outside_the_blocks_may_bear_a_lora() -> None:
    """They compute as they are: the time projection and the head of such a model in bf16."""
    model = tiny_transformer(dtype=torch.bfloat16)
    plain = a_pass(model, 60, WIDE)[0]
    for owner, name in ((model.condition_embedder, "time_proj"), (model, "proj_out")):
        layer = getattr(owner, name)
        delta = Delta(0, 1, 1.0)
        bearing = LoraLinear(layer, (delta,), Computing(Scratch(0, "cpu")), torch.bfloat16)
        values = {"weight": layer.weight.data, "bias": layer.bias.data}
        for key, place in delta.tensors((layer.out_features, layer.in_features)).items():
            values[key] = torch.zeros(place, dtype=torch.bfloat16)
        nn.Module.to_empty(bearing, device="cpu")
        bearing.load_state_dict(values)
        setattr(owner, name, bearing)
    found = a_pass(model, 60, WIDE)[0]
    assert found.dtype == WIDE
    assert (found - plain).abs().max() <= 2**-6 * plain.abs().max()  # two roundings to bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model in bf16."""
    where = tmp_path_factory.mktemp("bf16")
    return write_tiny_model(
        where, image_to_video=False, seed=2, vae={"base_dim": 8}, dtype=torch.bfloat16
    )


def made(folder: Path, **options: Any) -> Any:
    with an_engine(folder, **options) as engine:
        return engine.submit(a_request()).result()


def test_a_job_keeps_to_its_plan_and_says_so(folder: Path) -> None:
    found = made(folder)
    assert found.report.residual == "fp32"
    assert torch.equal(found.latents, made(folder, residual="fp32").latents)
    narrow = made(folder, residual="bf16")
    assert narrow.report.residual == "bf16" and not torch.equal(found.latents, narrow.latents)
    # streamed block by block from the disk, one branch a visit
    tight = made(folder, residual="fp32", branches="1", cross_kv="ram", vram="9MiB", ram="72MiB")
    assert torch.equal(found.latents, tight.latents)
    for phase in found.report.phases:
        assert phase.measured_vram_bytes <= phase.predicted_vram_bytes


def test_a_job_from_before_goes_on_in_bf16(folder: Path, tmp_path: Path) -> None:
    with an_engine(folder, residual="bf16") as engine:
        stop_after_a_step(engine, a_request(), tmp_path)
    with Journal.open(tmp_path) as journal:
        plan = dict(journal.record.plan)
        for phase in plan["phases"]:
            del phase["residual"]
        del plan["options"]["residual"]
        journal.mark("running", plan=plan)
        assert restored_plan(journal).residual == "bf16"
    with an_engine(folder) as engine:
        found = engine.resume(tmp_path).result()
    assert found.report.residual == "bf16"
    assert torch.equal(found.latents, made(folder, residual="bf16").latents)


def test_it_is_in_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    with an_engine(folder, residual="fp32") as engine:
        stop_after_a_step(engine, a_request(), tmp_path)
        kept = engine.plan(a_request(), saved=True)
    with Journal.open(tmp_path) as journal:
        plan = Plan.from_json(journal.record.plan).to_json()
        for phase in plan["phases"]:
            phase["residual"] = "bf16"
        journal.mark("running", plan=plan)
    tight = {"vram": kept.peak_vram_bytes - 1, "ram": "200MiB"}  # so that it is planned anew
    options = Options(**tight, device="cpu", residual="fp32")
    with (
        Engine.open(folder, options=options) as engine,
        pytest.raises(FingerprintMismatch, match="residual"),
    ):
        engine.resume(tmp_path)


def test_the_time_embedding_is_cast_a_run_of_rows_at_a_time() -> None:
    case = cost.DenoiseCase((1, 2, 2), 1, 1, 1, 40, image_tokens=257, residual="fp32")
    with FakeTensorMode(), torch.no_grad():
        model = fake_transformer(blocks=1)
        with StorageMeter([*model.parameters(), *model.buffers()]) as meter:
            steps = forward.step_modulation(model, torch.arange(40), torch.bfloat16, WIDE)
    spec = spec_of(model.config, 2)
    beside = meter.peak - cost.modulation_bytes(spec, case)
    assert len(steps) == 40 and steps[0].projection.dtype == WIDE
    rows = cost.WIDE_ROWS * spec.inner_dim * 4
    assert rows <= beside <= cost._wide_rows_bytes(spec, case) <= 1.3 * rows
