"""LoRAs are planned and counted with their blocks, and stream without changing a bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from penstock.engine.engine import Engine
from penstock.engine.files.locate import locate
from penstock.engine.lora.file import Lora
from penstock.engine.model.files import ModelFiles
from penstock.engine.request.generation import workload_of
from penstock.errors import OverBudget
from penstock.profiles.manifest import LoraSpec
from penstock.profiles.plan import StreamPlan
from penstock.profiles.planner import minimum_vram_bytes
from penstock.profiles.planner import plan as make_plan
from penstock.units import MIB
from tests.engine import lora_files as made
from tests.engine.run.test_budget import (
    NO_SHRINKING,
    _host_buffers_apart,
    _in_ram,
    _meter,
    _placed,
    _request,
    _run,
)
from tests.meter import StorageMeter

RANK = 300
"""Wider than anything in the tiny model: what is not planned for is seen."""


@pytest.fixture(scope="module")
def loras(i2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Lora]:
    """One in fp16, which is cast at every visit, with biases, norms and tables; one as stored."""
    folder = tmp_path_factory.mktemp("loras")
    source = locate(i2v_folder).streamed
    modules = made.linears(source, outside=False) + made.linears(source, outside=True)
    pairs = made.pairs(source, modules, RANK)
    wide = made.write_lightx2v(
        folder / "wide.safetensors",
        {module: (a / RANK, b) for module, (a, b) in pairs.items()},
        made.biases(source, modules),
        **{
            "patch_embedding.diff": 0.01 * torch.ones(source.shapes["patch_embedding.weight"]),
            "blocks.1.diff_m": 0.1 * torch.ones(source.shapes["blocks.1.scale_shift_table"]),
            "blocks.2.cross_attn.norm_k.diff": 0.1 * torch.ones(96),
            "blocks.3.self_attn.q.diff": 0.01 * torch.ones(96, 96),
        },
    )
    halves = {name: tensor.half() for name, tensor in load_file(wide).items()}
    save_file(halves, wide)
    stored = made.write_comfy(folder / "stored.safetensors", made.pairs(source, modules[:20], 4))
    return [Lora(wide, 0.5), Lora(stored, -0.3)]


@pytest.fixture(scope="module")
def engine(i2v_folder: Path, loras: list[Lora]) -> Engine:
    return Engine.open(i2v_folder, loras=loras, device="cpu", vram="1GiB", ram="1GiB")


def test_every_byte_of_them_is_in_the_manifest(
    i2v_folder: Path, engine: Engine, loras: list[Lora]
) -> None:
    plain = ModelFiles.open(i2v_folder).manifest.transformer
    with_loras = engine.model.manifest.transformer
    more = sum(with_loras.cross_block_bytes) - sum(plain.cross_block_bytes)
    more += with_loras.weights.total_bytes - plain.weights.total_bytes
    assert more >= sum(file.nbytes for file in engine.model.loras.files)
    assert with_loras.lora.rank == RANK
    assert plain.lora == LoraSpec()


@settings(
    max_examples=6,
    deadline=None,
    phases=NO_SHRINKING,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_neither_ledgers_nor_tensors_pass_the_budgets(
    engine: Engine, picture: Path, data: st.DataObject
) -> None:
    request = _request(picture, guidance_scale=data.draw(st.sampled_from([5.0, 1.0])))
    workload, manifest = workload_of(request), engine.model.manifest
    roomy = replace(engine.hardware, ram_bytes=64 * MIB)
    least = minimum_vram_bytes(manifest, workload, roomy)
    vram = data.draw(st.integers(least, 3 * least), label="vram")
    ram = data.draw(st.integers(10 * MIB, 20 * MIB), label="ram")
    try:
        plan = make_plan(manifest, workload, replace(roomy, vram_bytes=vram, ram_bytes=ram))
    except OverBudget as error:
        assert error.need_bytes > error.limit_bytes
        return
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = _run(engine, request, plan, overlapped=data.draw(st.booleans()))
    assert result.report.peak_vram_bytes <= vram
    assert result.report.peak_ram_bytes <= ram
    assert meter.peak <= vram + _in_ram(plan)
    for phase, promised in zip(result.report.phases, plan.phases, strict=False):
        assert phase.measured_vram_bytes <= promised.vram_bytes
        assert phase.measured_ram_bytes <= promised.ram_bytes


def test_the_plan_names_the_activations_of_the_rank(engine: Engine, picture: Path) -> None:
    denoise = engine.plan(_request(picture))["denoise"]
    tokens = 2 * 3 * 4  # latent frames and patches of 64x48x5
    assert dict(denoise.work)["lora"] == min(denoise.chunk_tokens, tokens) * RANK * 4


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_binding_makes_is_counted(engine: Engine, place: int) -> None:
    component = engine.model.transformer
    layout = component.rest if place == 0 else component.blocks[place - 1]
    prefix = "" if place == 0 else f"blocks.{place - 1}."
    tensors = {name: component.checkpoint.read(prefix + name) for name in layout.places}
    part = component.loras[place]
    with StorageMeter(tensors.values()) as meter:
        made_tensors = part(tensors)
    assert not {
        name for folds in part.folds.values() for fold in folds for name in fold.tensors
    } & {*made_tensors}
    assert 0.5 * part.nbytes("cpu") < meter.peak <= part.nbytes("cpu")


def test_streamed_is_resident_bit_for_bit(engine: Engine, picture: Path) -> None:
    request = _request(picture)
    plan, count = engine.plan(request), len(engine.model.transformer.blocks)
    resident = _placed(plan, StreamPlan(count, device_resident=count))
    expected = _run(engine, request, resident, overlapped=False)
    for stream in (StreamPlan(count, 1, 2, 2, 1), StreamPlan(count, 0, 0, 3, 2)):
        for overlapped in (True, False):
            found = _run(engine, request, _placed(plan, stream, branches=1), overlapped)
            assert torch.equal(found.latents, expected.latents)


def test_the_result_is_another_with_them(engine: Engine, i2v_folder: Path, picture: Path) -> None:
    request = _request(picture)
    with Engine.open(i2v_folder, device="cpu", vram="1GiB", ram="1GiB") as plain:
        without = plain.submit(request).result().latents
    found = engine.submit(request).result().latents
    assert found is not None and without is not None
    assert (found - without).abs().max() > 0.01
