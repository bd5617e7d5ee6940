"""Benchmarks: models made on the spot, the measurement on a job's own path, what is kept of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from penstock.blocks import PAGE_BYTES
from penstock.engine.bench import measure as bench_measure
from penstock.engine.bench import order as bench_order
from penstock.engine.bench import weights as bench_weights
from penstock.engine.bench.machine import machine
from penstock.engine.bench.measure import Asked, Memory, measure
from penstock.engine.bench.order import BenchOrder, fitting_blocks, run, sweep
from penstock.engine.bench.plot import Dot, _round_up, draw
from penstock.engine.bench.result import (
    BenchResult,
    Links,
    PhaseFigures,
    Recipe,
    StepFigures,
    Thresholds,
    compare,
    load,
    save,
)
from penstock.engine.bench.weights import (
    FORMATS,
    streamed_bytes,
    write_streamed,
    write_synthetic,
)
from penstock.engine.engine import Engine
from penstock.engine.families.wan.structure import transformer_shapes
from penstock.engine.families.wan.synthetic import SYNTHETIC
from penstock.engine.machine.disk import read_rate
from penstock.engine.model.files import ModelFiles
from penstock.engine.request.generation import GenerationRequest
from penstock.errors import UsageError
from penstock.formats.formats import get_format
from penstock.profiles.options import Options
from penstock.profiles.plan import StreamPlan
from penstock.quant.policy import default_policy

MIB = 1 << 20
KIND = SYNTHETIC["tiny"].kind


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("tiny"), "tiny", blocks=4)


def _request(folder: Path, steps: int = 3) -> GenerationRequest:
    picture = folder / "picture.png"
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(picture)
    return GenerationRequest(
        prompt="a cat", image=picture, width=32, height=32, frames=5, steps=steps, seed=3
    )


def test_a_format_that_the_model_has_not_is_packed_before_the_clock(
    tiny: Path, tmp_path: Path
) -> None:
    with Engine.open(tiny, format="nf4", vram="64MiB", device="cpu", cache=tmp_path) as engine:
        result = measure(engine, Asked(_request(tmp_path), 0, "tiny"))
    assert [phase.name for phase in result.phases] == ["context", "denoise"]


# Weights


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_synthetic_transformer_is_a_model_like_any_other(
    weight_format: str, tiny: Path, tmp_path: Path
) -> None:
    config = SYNTHETIC["tiny"].config(3)
    path = write_streamed(tmp_path / "transformer", KIND, config, weight_format)
    assert path.stat().st_size == streamed_bytes(KIND, config, weight_format)
    for part in tiny.iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    model = ModelFiles.open(tmp_path)
    assert len(model.transformer.blocks) == 3
    assert model.transformer.source.label().startswith(weight_format)
    for layout in (*model.transformer.blocks, *model.transformer.cross):
        assert len(layout.extents) == 1, "a block is one read"
        assert layout.extents[0].file_offset % PAGE_BYTES == 0
    model.close()


def test_no_two_blocks_of_a_synthetic_transformer_are_alike(tmp_path: Path) -> None:
    path = write_streamed(tmp_path, KIND, SYNTHETIC["tiny"].config(4), "int8")
    with safe_open(str(path), "pt") as file:
        for name in ("attn1.to_q.weight", "attn1.to_q.weight_scale", "ffn.net.0.proj.bias"):
            found = [file.get_tensor(f"blocks.{block}.{name}") for block in range(4)]
            assert all(
                not torch.equal(one, other)
                for place, one in enumerate(found)
                for other in found[:place]
            ), name
        norm = file.get_tensor("blocks.0.norm2.weight").float()
        assert abs(norm.mean().item() - 1) < 0.1


def _parameters(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), "pt") as file:
        names = [name for name in file.keys() if not name.startswith("__")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def test_synthetic_weights_have_the_spread_of_true_ones(tmp_path: Path) -> None:
    config = SYNTHETIC["tiny"].config(6)
    found = _parameters(write_streamed(tmp_path, KIND, config, "bf16"))
    large = {name: tensor.float() for name, tensor in found.items() if tensor.numel() > 10_000}
    assert len(large) > 20
    for name, tensor in large.items():
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(tensor.mean().item()) < 0.001, name


def test_blocks_of_true_size_have_no_equal_tensors() -> None:
    shapes = transformer_shapes(SYNTHETIC["wan2.1-i2v-14b"].config(None))
    chosen = default_policy(shapes)
    turns = [
        (shape, name in chosen, rotation % (shape[0] if name in chosen else math.prod(shape)))
        for name, shape in shapes.items()
        for rotation in [bench_weights._rotation(name, "blocks.")]
        if not name.endswith("norm2.weight")
    ]
    assert len(set(turns)) == len(turns)


@pytest.mark.parametrize("shape", [(4097, 2048), (13824, 512), (2048, 4096)])
def test_a_sample_that_repeats_its_numbers_repeats_no_row(shape: tuple[int, int]) -> None:
    made = bench_weights._Samples(get_format("bf16"), "blocks.", 0)
    values = made._values(shape, 4_000_000)
    assert values.numel() > bench_weights._POOL
    rows = {row.numpy().tobytes() for row in values.view(torch.uint8)}
    assert len(rows) == shape[0]
    columns = values.float()[:2000].T
    assert torch.corrcoef(columns[:64]).fill_diagonal_(0).abs().max() < 0.15
    assert values.float().std().item() == pytest.approx(0.02, rel=0.01)


def test_the_14b_model_has_its_true_size() -> None:
    config = SYNTHETIC["wan2.1-i2v-14b"].config(None)
    assert 16.3e9 < streamed_bytes(KIND, config, "int8") < 17e9
    assert 32.7e9 < streamed_bytes(KIND, config, "bf16") < 33e9


def test_weights_without_room_on_the_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_weights.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 30})
    )
    with pytest.raises(UsageError, match="no room.*fewer --blocks"):
        write_streamed(tmp_path, KIND, SYNTHETIC["tiny"].config(None), "int8")
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("name", "blocks", "weight_format", "message"),
    [
        ("gpt", None, "int8", "no such synthetic model"),
        ("tiny", 7, "int8", "1 to 6"),
        ("tiny", 0, "int8", "1 to 6"),
        ("tiny", None, "gguf-q8_0", "no synthetic weights in this format"),
    ],
)
def test_what_cannot_be_made_is_refused(
    name: str, blocks: int | None, weight_format: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write_synthetic(tmp_path / "m", name, blocks=blocks, weight_format=weight_format)


# Measuring


def test_a_benchmark_computes_what_a_job_computes(tiny: Path, tmp_path: Path) -> None:
    request = _request(tmp_path)
    with Engine.open(tiny, vram="64MiB", ram="64MiB", device="cpu") as engine:
        result = measure(engine, Asked(request, 1, "tiny", whole=True))
        job = engine.submit(request).result()
    assert result.latents_sha256 == hashlib.sha256(job.latents.numpy().tobytes()).hexdigest()
    assert [phase.name for phase in result.phases] == [p.name for p in job.report.phases]
    for ours, theirs in zip(result.phases, job.report.phases, strict=True):
        assert (ours.read_bytes, ours.copied_bytes) == (theirs.read_bytes, theirs.copied_bytes)
        assert ours.ledger_vram_bytes == theirs.measured_vram_bytes <= ours.predicted_vram_bytes


def _measured(tiny: Path, request: GenerationRequest, warmup: int, places: StreamPlan) -> Any:
    rules = Options(chunk_tokens="4", branches="1")
    with Engine.open(tiny, vram="8MiB", ram="64MiB", device="cpu", options=rules) as engine:
        plan = engine.plan(request)
        plan = plan.with_phases((replace(plan["denoise"], stream=places),))
        return measure(engine, Asked(request, warmup, "tiny"), plan=plan)


def test_the_counted_steps_are_those_after_the_warm_up(tiny: Path, tmp_path: Path) -> None:
    request = _request(tmp_path, steps=5)
    result = _measured(tiny, request, 2, StreamPlan(4, device_slots=1, staging_buffers=1))
    assert (len(result.warmup), len(result.steps)) == (2, 3)
    assert result.recipe.steps == 3
    denoise = next(phase for phase in result.phases if phase.name == "denoise")
    steps = (*result.warmup, *result.steps)
    assert sum(step.seconds for step in steps) <= denoise.seconds
    # Two passes a step over four blocks from disk; rings of one are at most two blocks ahead.
    block_bytes = denoise.read_bytes // (5 * 2 * 4)
    assert denoise.read_bytes == 5 * 2 * 4 * block_bytes > 0
    assert result.steps[0].read_bytes == pytest.approx(8 * block_bytes, abs=2 * block_bytes)
    assert 0 < result.overlap <= 1
    assert set(denoise.waits_s) >= {"disk_wait_s", "slot_wait_s", "compute_wait_s"}


def test_where_the_blocks_live_changes_no_bit(tiny: Path, tmp_path: Path) -> None:
    request = _request(tmp_path)
    streamed = _measured(tiny, request, 0, StreamPlan(4, device_slots=1, staging_buffers=1))
    resident = _measured(tiny, request, 0, StreamPlan(4, device_resident=4))
    assert streamed.latents_sha256 == resident.latents_sha256
    assert streamed.phases[-1].read_bytes == 6 * resident.phases[-1].read_bytes


def test_at_least_one_step_counts(tmp_path: Path) -> None:
    for warmup in (-1, 3):
        with pytest.raises(UsageError, match="warm-up"):
            Asked(_request(tmp_path), warmup, "tiny")


def test_links_that_are_known_are_not_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*arguments: Any) -> Links:
        raise AssertionError("measured again")

    monkeypatch.setattr(bench_measure, "links", unwanted)
    asked = Asked(_request(tmp_path, steps=1), 0, "tiny")
    with Engine.open(tiny, vram="64MiB", ram="64MiB", device="cpu") as engine:
        assert measure(engine, asked, reached=Links(1.0, 2.0, 3.0)).links == Links(1.0, 2.0, 3.0)
        with pytest.raises(AssertionError, match="measured again"):
            measure(engine, asked)


def test_the_process_is_watched_from_outside() -> None:
    with Memory(torch.device("cpu")) as memory:
        memory.reset()
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        while memory._peak < memory._base + 48 * MIB:
            time.sleep(0.01)  # until the watching thread has had its turn
        del held
        process_bytes, allocator_bytes = memory.peaks()
    assert process_bytes >= 48 * MIB
    assert allocator_bytes == 0


def test_the_disk_is_measured_on_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * MIB + 17))
    assert read_rate(path, 20 * MIB + 17, 4) > 0
    assert read_rate(path, 1000, 1) > 0


def test_the_machine_is_described() -> None:
    facts = machine(torch.device("cpu"))
    assert facts["ram_bytes"] > 0 and facts["gpu"] is None and facts["cpu"]
    assert json.loads(json.dumps(facts)) == facts


# Orders


def test_an_order_makes_its_model_and_removes_it(tmp_path: Path) -> None:
    told: list[str] = []
    order = BenchOrder(
        synthetic="tiny", blocks=2, width=32, height=32, frames=5, steps=2, guidance=1.0,
        folder=tmp_path, options=Options(format="fp8", device="cpu"),
    )  # fmt: skip
    result = run(order, lambda event: None, told.append)
    assert list(tmp_path.iterdir()) == []
    assert result.recipe.model.startswith("tiny, 2 blocks")
    assert result.recipe.weight_format == "fp8 per row"
    assert result.recipe.branches == 1
    assert told[0].startswith("making 2 blocks of tiny in fp8")


def test_a_sweep_tells_what_does_not_fit(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text('vram = "1KiB"\nram = "1MiB"\n')
    size = {"width": 32, "height": 32, "frames": 5, "steps": 1, "warmup": 0}
    order = BenchOrder(model=str(tiny), options=Options(device="cpu"), **size)
    small = str(tmp_path / "small.toml")
    points = sweep(order, ["4gb", small], lambda event: None, lambda line: None)
    assert points[0].result is not None and points[0].profile == "4gb"
    assert points[1].result is None and "no plan fits" in points[1].refusal


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither"),
        ({"model": "x", "synthetic": "tiny"}, "both"),
        ({"model": "x", "blocks": 3}, "--blocks with --synthetic"),
        ({"synthetic": "tiny", "minutes": 0.0}, "--minutes"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchOrder(**given)


def test_blocks_are_as_many_as_disk_and_time_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = BenchOrder(synthetic="wan2.1-i2v-14b", options=Options(device="cpu"), minutes=1e6)
    config = SYNTHETIC["wan2.1-i2v-14b"].config
    room = streamed_bytes(KIND, config(7), "int8") + bench_weights.FREE_BYTES

    def usage(_: object) -> Any:
        return type("Usage", (), {"free": room})

    monkeypatch.setattr(bench_order.shutil, "disk_usage", usage)
    assert fitting_blocks(order, "int8", tmp_path) == 7
    room -= 1 << 20
    assert fitting_blocks(order, "int8", tmp_path) == 6
    room = 1 << 50
    assert fitting_blocks(order, "int8", tmp_path) == 40
    monkeypatch.setattr(bench_order, "_predicted_s", lambda *_: 1200.0)
    assert fitting_blocks(replace(order, minutes=5), "int8", tmp_path) == 10
    assert fitting_blocks(replace(order, minutes=0.001), "int8", tmp_path) == 1


# Results


def _result(seconds: tuple[float, ...] = (1.0, 1.2, 1.1), **recipe: Any) -> BenchResult:
    asked: dict[str, Any] = {
        "model": "m", "weight_format": "int8", "width": 32, "height": 32, "frames": 5,
        "steps": len(seconds), "warmup": 1, "branches": 2, "device": "cpu",
        "compute": "plain", "profile": "auto", "vram": "", "ram": "", "chunk_tokens": 64,
        "whole": False,
    }  # fmt: skip
    phase = PhaseFigures(
        "denoise", 4.0, 3.5, "read", 8_000, 8_000, 2.0, 1.0, 0.4, {"compute_wait_s": 0.4}, 900,
        800, 700, 600, 1700, 0,
    )  # fmt: skip
    return BenchResult(
        recipe=Recipe(**(asked | recipe)),
        machine={"cpu": "a", "versions": {"torch": "2"}},
        links=Links(5e3, 4e3, 1e4),
        warmup=(StepFigures(2.0, 10, 10, 1.0),),
        steps=tuple(StepFigures(each, 10, 10, 0.1) for each in seconds),
        phases=(phase,),
        placement={"disk_blocks": 4, "staging_buffers": 2},
        vram_limit_bytes=1000,
        ram_limit_bytes=1000,
        latents_sha256="0",
    )


def test_figures_follow_from_what_was_counted() -> None:
    result = _result()
    assert result.median_s == 1.1
    assert result.spread_s == pytest.approx(0.2)
    assert result.overlap == pytest.approx(1 - 0.3 / 3.3)
    assert result.phases[0].read_bytes_per_s == 4_000
    assert result.phases[0].overlap == pytest.approx(0.9)
    assert replace(result.phases[0], read_s=0.0).read_bytes_per_s == 0


def test_a_saved_result_comes_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    save(_result(), path)
    assert load(path) == _result()
    with pytest.raises(UsageError, match="cannot be written"):
        save(_result(), tmp_path / "nowhere" / "result.json")


def test_a_result_from_before_recipes_had_rules_is_read(tmp_path: Path) -> None:
    value = json.loads(json.dumps(_result().to_json()))
    del value["recipe"]["rules"]
    value["placement"]["host_slabs"] = value["placement"].pop("staging_buffers")
    text = json.dumps(value["recipe"], sort_keys=True)
    assert value["recipe_hash"] == hashlib.sha256(text.encode()).hexdigest()[:16]
    (tmp_path / "old.json").write_text(json.dumps(value))
    assert load(tmp_path / "old.json") == _result()
    ruled = _result(rules={"branches": "1"})
    assert ruled.recipe.hash != _result().recipe.hash
    save(ruled, tmp_path / "new.json")
    assert load(tmp_path / "new.json") == ruled
    assert compare(_result(), ruled, Thresholds()).outcome == "RECIPE_MISMATCH"


def _broken(change: dict[str, Any], drop: str = "") -> str:
    value = json.loads(json.dumps(_result().to_json())) | change
    value.pop(drop, None)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no saved benchmark"),
        ("[1]", "no object"),
        ("[" * 100_000, "no saved benchmark"),
        ("{}", "None"),
        (_broken({"schema": "penstock bench 99"}), "bench 99"),
        (_broken({}, drop="links"), "links is missing"),
        (_broken({"steps": []}), "no counted steps"),
        (_broken({"steps": {}}), "steps is no list"),
        (_broken({"steps": [3]}), r"steps\[\] is no object"),
        (_broken({"phases": []}), "no counted steps"),
        (_broken({"placement": {"n": "x"}}), "placement.n is str"),
        (_broken({"vram_limit_bytes": True}), "is bool"),
        (_broken({"vram_limit_bytes": -1}), "is -1"),
        (_broken({"links": {}}), "missing"),
        (_broken({"machine": 3}), "machine is no object"),
        (_broken({"notices": [3]}), r"notices\[\] is int"),
        (_broken({"recipe_hash": "00"}), "does not match its hash"),
        (_broken({}).replace('"seconds": 1.0', '"seconds": NaN'), "is nan"),
        (_broken({}).replace('"seconds": 1.0', '"seconds": 0'), "no counted steps"),
        (_broken({}).replace('"width": 32', '"width": 33'), "does not match its hash"),
    ],
)
def test_a_file_that_is_no_result_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load(path)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no saved benchmark"):
        load(tmp_path / "nothing")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UsageError, match="bytes"):
        load(huge)


@pytest.mark.parametrize(
    ("seconds", "thresholds", "outcome"),
    [
        ((1.1, 1.1, 1.1), Thresholds(), "PASS"),
        ((0.2, 0.2, 0.2), Thresholds(), "PASS"),
        ((1.3, 1.3, 1.3), Thresholds(), "REGRESSION"),
        ((1.3, 1.3, 1.3), Thresholds(percent=25), "PASS"),
        ((1.3, 1.3, 1.3), Thresholds(seconds=0.5), "PASS"),
        ((1.14, 1.14, 1.14), Thresholds(), "PASS"),
    ],
)
def test_worse_is_what_is_beyond_both_thresholds(
    seconds: tuple[float, ...], thresholds: Thresholds, outcome: str
) -> None:
    verdict = compare(_result(), _result(seconds), thresholds)
    assert verdict.outcome == outcome
    assert verdict.exit_code == (0 if outcome == "PASS" else 1)
    assert any("seconds a step" in line for line in verdict.lines)


def test_a_higher_peak_is_a_regression() -> None:
    old = _result()
    phase = replace(old.phases[0], ledger_ram_bytes=600 + (64 << 20))
    verdict = compare(old, replace(old, phases=(phase,)), Thresholds())
    assert verdict.outcome == "REGRESSION"
    assert any(line.startswith("worse: peak RAM") for line in verdict.lines)


def test_another_recipe_is_no_comparison() -> None:
    verdict = compare(_result(), _result(width=64), Thresholds())
    assert (verdict.outcome, verdict.exit_code) == ("RECIPE_MISMATCH", 2)
    assert verdict.lines == ("width: 32 then, 64 now",)


def test_another_machine_is_told() -> None:
    new = replace(_result(), machine={"cpu": "b", "versions": {"torch": "2"}})
    verdict = compare(_result(), new, Thresholds())
    assert verdict.outcome == "PASS"
    assert "note: cpu differs: 'a' then, 'b' now" in verdict.lines


def test_thresholds_are_sane() -> None:
    for bad in ({"percent": -1.0}, {"seconds": float("nan")}):
        with pytest.raises(UsageError, match="threshold"):
            Thresholds(**bad)


def test_a_plot_shows_its_dots(tmp_path: Path) -> None:
    dots = [Dot(4.0, 9.0, "4gb"), Dot(12.0, 3.0, "12gb")]
    draw(dots, tmp_path / "a.png", title="t", x_label="x", y_label="y")
    draw(dots[:1], tmp_path / "b.png", title="t", x_label="x", y_label="y")
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert one.shape == other.shape
    blue = [int((picture == (30, 90, 200)).all(axis=-1).sum()) for picture in (one, other)]
    assert blue[0] > blue[1] > 50
    with pytest.raises(UsageError, match="nothing to draw"):
        draw([], tmp_path / "c.png", title="", x_label="", y_label="")
    with pytest.raises(UsageError, match="cannot be written"):
        draw(dots, tmp_path / "no" / "d.png", title="", x_label="", y_label="")


@given(value=st.floats(1e-9, 1e9))
@example(value=59.9)  # 9.98 units a tick: with the margin beyond ten of them
@example(value=5.9e-7)
def test_an_axis_ends_a_little_above_its_largest_value(value: float) -> None:
    assert 1.02 * value <= _round_up(value) * (1 + 1e-9) and _round_up(value) <= 2.5 * value
