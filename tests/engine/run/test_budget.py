"""The budget is a ceiling: by the ledgers, and by an independent count of live tensor storages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.run.pipeline import run
from penstock.engine.run.report import JobResult
from penstock.engine.run.stage import Run
from penstock.errors import OverBudget
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from penstock.profiles.planner import minimum_vram_bytes
from penstock.profiles.planner import plan as make_plan
from penstock.units import MIB
from tests.meter import StorageMeter


def _request(image: Path | None = None, **changes: Any) -> GenerationRequest:
    request = GenerationRequest(
        prompt="a red circle moves",
        negative_prompt="",
        image=image,
        width=64,
        height=48,
        frames=5,
        steps=2,
        seed=3,
    )
    return replace(request, **changes)


@contextmanager
def _host_buffers_apart(meter: StorageMeter) -> Iterator[None]:
    """Host buffers are RAM, not VRAM: on a CPU both are tensors, and the meter must tell them."""
    made = torch.frombuffer

    def remembered(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = made(*arguments, **options)
        meter.exclude(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "frombuffer", remembered)
        yield


def _run(engine: Engine, request: GenerationRequest, plan: Plan, overlapped: bool) -> JobResult:
    """On this thread: a dispatch mode sees one thread only."""
    job = Run(
        model=engine.model,
        request=request,
        plan=plan,
        device=torch.device("cpu"),
        overlapped=overlapped,
        output=None,
        overwrite=False,
        metadata=False,
    )
    return run(job, lambda event: None, threading.Event())


def _meter(engine: Engine) -> StorageMeter:
    """Not counted: small tables that the networks' classes themselves hold."""
    modules = (component.module for component in engine.model.components())
    return StorageMeter(b for module in modules for b in module.buffers() if not b.is_meta)


def _in_ram(plan: Plan) -> int:
    """What a plan promises of RAM besides weights: on a CPU these are tensors as well."""
    return max(phase.ram_work_bytes for phase in plan.phases if phase.name != "mux")


_MODELS = [
    {},
    {"transformer": {"num_layers": 3, "ffn_dim": 512, "num_attention_heads": 2}},
    {"transformer": {"num_layers": 9, "attention_head_dim": 48}, "text": {"num_layers": 5}},
]


@pytest.fixture(scope="module", params=range(len(_MODELS)), ids=lambda index: f"model{index}")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    changes = _MODELS[request.param]
    image_to_video = request.param != 1
    write_tiny_model(
        folder, image_to_video=image_to_video, seed=request.param, vae={"base_dim": 8}, **changes
    )
    with Engine.open(folder, device="cpu", vram="1GiB", ram="1GiB") as opened:
        yield opened


NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


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
    request = _request(picture if engine.model.image_to_video else None)
    guidance = data.draw(st.sampled_from([5.0, 1.0]), label="guidance")
    request = replace(request, guidance_scale=guidance)
    workload, manifest = workload_of(request), engine.model.manifest
    roomy = replace(engine.hardware, ram_bytes=64 * MIB)
    least = minimum_vram_bytes(manifest, workload, roomy)
    vram = data.draw(st.integers(least, 3 * least), label="vram")
    ram = data.draw(st.integers(8 * MIB, 16 * MIB), label="ram")
    hardware = replace(roomy, vram_bytes=vram, ram_bytes=ram)
    try:
        plan = make_plan(manifest, workload, hardware)
    except OverBudget as error:
        assert error.need_bytes > error.limit_bytes
        return
    assert plan.peak_vram_bytes <= vram
    assert plan.peak_ram_bytes <= ram
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = _run(engine, request, plan, overlapped=data.draw(st.booleans()))
    assert result.report.peak_vram_bytes <= vram
    assert result.report.peak_ram_bytes <= ram
    assert meter.peak <= vram + _in_ram(plan)
    for phase, promised in zip(result.report.phases, plan.phases, strict=False):
        assert phase.measured_vram_bytes <= promised.vram_bytes
        assert phase.measured_ram_bytes <= promised.ram_bytes


def test_the_meter_sees_what_the_ledger_is_not_told(engine: Engine, picture: Path) -> None:
    """The check above can fail: a plan that promises no activations is caught by the meter."""
    request = _request(picture if engine.model.image_to_video else None)
    plan = engine.plan(request)
    lying = replace(
        plan, phases=tuple(replace(phase, work=(("nothing", 0),)) for phase in plan.phases)
    )
    with _meter(engine) as meter, _host_buffers_apart(meter):
        _run(engine, request, lying, overlapped=True)
    assert meter.peak > lying.peak_vram_bytes + _in_ram(lying)


def test_one_byte_under_the_least_is_refused(engine: Engine, picture: Path) -> None:
    request = _request(picture if engine.model.image_to_video else None)
    workload, manifest = workload_of(request), engine.model.manifest
    least = minimum_vram_bytes(manifest, workload, engine.hardware)
    exact = make_plan(manifest, workload, replace(engine.hardware, vram_bytes=least))
    assert exact.peak_vram_bytes == least
    with pytest.raises(OverBudget, match="no plan fits the VRAM budget") as caught:
        make_plan(manifest, workload, replace(engine.hardware, vram_bytes=least - 1))
    assert caught.value.need_bytes == least
    assert caught.value.limit_bytes == least - 1
    label, largest = caught.value.consumers[0]
    assert largest == max(count for _, count in caught.value.consumers)
    assert f"{least:,} bytes" in str(caught.value)
    assert label in str(caught.value)


def test_too_little_ram_is_refused_by_name(engine: Engine, picture: Path) -> None:
    request = _request(picture if engine.model.image_to_video else None)
    tight = replace(engine.hardware, ram_bytes=1000)
    with pytest.raises(OverBudget, match="no plan fits the RAM budget"):
        make_plan(engine.model.manifest, workload_of(request), tight)


def test_a_model_several_times_larger_than_both_budgets_runs(tmp_path: Path, picture: Path) -> None:
    folder = write_tiny_model(
        tmp_path,
        vae={"base_dim": 8},
        transformer={"num_layers": 16, "num_attention_heads": 8, "ffn_dim": 4096},
    )
    with Engine.open(folder, device="cpu", vram="28MiB", ram="20MiB") as engine:
        size = engine.model.manifest.transformer.weights.total_bytes
        assert size > 3 * 28 * MIB
        result = engine.submit(_request(picture, guidance_scale=1.0)).result()
        assert result.report.peak_vram_bytes <= 28 * MIB
        assert result.report.peak_ram_bytes <= 20 * MIB
        denoise = next(p for p in result.report.phases if p.name == "denoise")
        assert denoise.read_bytes > size
    assert torch.isfinite(result.latents).all()


@settings(
    max_examples=5,
    deadline=None,
    phases=NO_SHRINKING,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_streamed_is_resident_is_sequential_bit_for_bit(
    engine: Engine, picture: Path, data: st.DataObject
) -> None:
    request = _request(picture if engine.model.image_to_video else None)
    plan = engine.plan(request)
    n_blocks = len(engine.model.transformer.blocks)
    resident = _placed(plan, StreamPlan(n_blocks, device_resident=n_blocks))
    on_device = data.draw(st.integers(0, n_blocks - 1), label="on device")
    in_ram = data.draw(st.integers(0, n_blocks - on_device), label="in RAM")
    streamed = StreamPlan(
        n_blocks,
        on_device,
        in_ram,
        device_slots=data.draw(st.integers(1, 4), label="slots"),
        staging_buffers=data.draw(st.integers(1, 4), label="staging buffers"),
    )
    branches = data.draw(st.sampled_from([1, 2]), label="branches at once")
    plans = _placed(plan, streamed, branches)
    expected = _run(engine, request, resident, overlapped=False)
    for overlapped in (True, False):
        found = _run(engine, request, plans, overlapped)
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.video, expected.video)


def _placed(plan: Plan, stream: StreamPlan, branches: int = 2) -> Plan:
    def place(phase: PhasePlan) -> PhasePlan:
        if phase.name != "denoise":
            return phase
        return replace(phase, stream=stream, branches=branches, chunk_tokens=10**6)

    return replace(plan, phases=tuple(map(place, plan.phases)))
