"""A format that the files do not hold: packed once by the first job, and read from there after."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penstock.engine import variants
from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files, locate
from penstock.engine.packs.cache import cached_packs
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Notice, PhaseStarted, Progress
from penstock.engine.run.jobs import describe, opening_of
from penstock.engine.run.report import JobResult
from penstock.engine.store import durable, sums
from penstock.errors import (
    FingerprintMismatch,
    JobCancelled,
    OverBudget,
    PenstockError,
    StorageError,
    UsageError,
)
from penstock.quant.paths import Computing
from penstock.quant.probe import PathReport
from tests.engine import golden
from tests.engine.packs.test_scratch import REQUEST as LEAST
from tests.engine.packs.test_scratch import least_plan
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run

REQUEST = GenerationRequest(
    prompt="a red circle", negative_prompt="", width=48, height=32, frames=5, steps=2, seed=3,
    guidance_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(locate(model), "int8", tmp_path_factory.mktemp("packed") / "int8").folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(model: Path, cache: Path, files: Files | None = None, **options: Any) -> Engine:
    budgets = {"device": "cpu", "vram": "256MiB", "ram": "256MiB"}
    return Engine.open(model, files=files, cache=cache, **(budgets | options))


def result_of(model: Path, cache: Path, files: Files | None = None, **options: Any) -> JobResult:
    with opened(model, cache, files, **options) as engine:
        return engine.submit(REQUEST).result()


def int8_file(model: Path, folder: Path, spelling: str = "lightx2v int8") -> Files:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    stored = golden.make(tensors, names, spelling)
    return Files(transformer=stored.save(folder / "x.safetensors"))


@pytest.fixture(scope="module")
def expected(packed: Path) -> Tensor:
    return result_of(packed, packed).latents


def test_the_first_job_packs_and_the_second_reads(
    model: Path, cache: Path, expected: Tensor
) -> None:
    with opened(model, cache, format="int8") as engine:
        plan = engine.plan(REQUEST)
        assert [phase.name for phase in plan.phases][:2] == ["pack", "text"]
        assert plan.weight_format == "int8"
        assert not cache.exists(), "a plan writes nothing"
        job = engine.submit(REQUEST)
        events = list(job.events())
        first = job.result()
        again = engine.submit(REQUEST).result()
    assert [e.phase for e in events if isinstance(e, PhaseStarted)][0] == "pack"
    assert any(isinstance(e, Notice) and "packing the transformer as int8" in e.message
               for e in events)  # fmt: skip
    (found,) = cached_packs(cache)
    assert found.complete and found.source == str(model / "transformer")
    assert torch.equal(first.latents, expected)
    assert first.report.weight_format == "int8"
    assert first.report.phases[0].name == "pack"
    before = {path: path.stat().st_mtime_ns for path in found.path.rglob("*.safetensors")}
    anew = result_of(model, cache, format="int8")
    for later in (again, anew):
        assert torch.equal(later.latents, expected)
        assert later.report.phases[0].name == "text"
        assert any("is read as int8 from" in told for told in later.report.notices)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("wanted", ["int8", "nf4", "gguf-q8_0", "quanto-int4"])
def test_the_plan_before_packing_is_the_plan_after_it(
    model: Path, cache: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model was written a moment ago, and may not have settled: its pack would be doubted.
    monkeypatch.setattr(sums, "SETTLED_NS", 0)
    with opened(model, cache, format=wanted) as engine:
        foreseen = engine.plan(REQUEST)
        engine.submit(REQUEST).result()
    with opened(model, cache, format=wanted) as engine:
        plan = engine.plan(REQUEST)
    assert plan.phases == foreseen.phases[1:]
    assert (plan.weight_format, plan.compute_path) == (wanted, "dequant")


def test_what_is_stored_in_the_format_is_not_copied(
    tmp_path: Path, model: Path, cache: Path
) -> None:
    for spelling, wanted in (("comfy old", "fp8"), ("lightx2v int8", "int8")):
        files = int8_file(model, tmp_path, spelling)
        found = result_of(model, cache, files, format=wanted)
        assert found.report.weight_format == wanted
    assert result_of(model, cache, format="bf16").report.weight_format == "bf16"
    assert not cache.exists()


def test_a_quantised_file_is_packed_in_another_format_where_a_flag_says_so(
    tmp_path: Path, model: Path, cache: Path
) -> None:
    found = result_of(model, cache, int8_file(model, tmp_path), format="nf4")
    assert found.report.weight_format == "nf4"
    assert len(cached_packs(cache)) == 1


def profile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("formats", "stored", "found"),
    [('["nf4", "int8"]', "bf16", "nf4"), ('["fp16", "int8"]', "bf16", "bf16"),
     ('["nf4"]', "int8", "int8"), (None, "bf16", "bf16")],
)  # fmt: skip
def test_a_profiles_formats_count_for_plain_files_only(
    tmp_path: Path, model: Path, cache: Path, formats: str | None, stored: str, found: str
) -> None:
    files = int8_file(model, tmp_path) if stored == "int8" else None
    words = 'summary = "x"\n' + ("" if formats is None else f"formats = {formats}\n")
    with opened(model, cache, files, profile=profile(tmp_path, words)) as engine:
        plan = engine.plan(REQUEST)
    assert plan.weight_format == found
    assert (plan.phases[0].name == "pack") == (found == "nf4")
    with opened(model, cache, files, profile=profile(tmp_path, words), format="fp8") as engine:
        assert engine.plan(REQUEST).weight_format == "fp8"


def test_packing_that_was_cancelled_goes_on_where_it_stopped(
    tmp_path: Path, model: Path, cache: Path, expected: Tensor
) -> None:
    with opened(model, cache, format="int8") as engine:
        job = engine.submit(REQUEST, job_dir=tmp_path / "job")
        for event in job.events():
            if isinstance(event, Progress) and event.phase == "pack":
                job.cancel()
        with pytest.raises(JobCancelled):
            job.result()
    (stopped,) = cached_packs(cache)
    assert not stopped.complete and stopped.nbytes > 0
    opening = opening_of(tmp_path / "job")
    with Engine.reopen(opening, cache=cache) as engine:
        found = engine.resume(tmp_path / "job").result()
    assert torch.equal(found.latents, expected)
    assert cached_packs(cache)[0].complete


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, model: Path, cache: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(model, cache, format="int8") as engine:
        with monkeypatch.context() as patch:
            job_needs = 64 << 20
            patch.setattr(
                durable.FileOps,
                "free_bytes",
                lambda self, path: 0 if "job" not in str(path) else job_needs,
            )
            with pytest.raises(StorageError, match="full"):
                engine.submit(REQUEST, job_dir=tmp_path / "job").result()
        assert not cached_packs(cache)
        assert describe(tmp_path / "job").state == "failed"
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, expected)


def test_a_job_is_resumed_where_its_pack_was_removed(
    tmp_path: Path, model: Path, cache: Path, expected: Tensor
) -> None:
    with opened(model, cache, format="int8") as engine:
        job = engine.submit(REQUEST, job_dir=tmp_path / "job")
        for event in job.events():
            if isinstance(event, Progress) and event.phase == "denoise":
                job.cancel()
        with pytest.raises(JobCancelled):
            job.result()
    shutil.rmtree(cache)
    opening = opening_of(tmp_path / "job")
    assert opening.options.format == "int8"
    with Engine.reopen(opening, cache=cache) as engine:
        found = engine.resume(tmp_path / "job").result()
    assert torch.equal(found.latents, expected)


@pytest.mark.parametrize("name", ["int3", "gguf-q6_k"])
def test_what_cannot_be_written_is_refused_before_anything_is_done(
    model: Path, cache: Path, name: str
) -> None:
    with opened(model, cache, format=name) as engine, pytest.raises(UsageError, match=name):
        engine.submit(REQUEST)


def test_too_little_ram_to_pack_is_refused_in_the_plan(model: Path, cache: Path) -> None:
    with (
        opened(model, cache, format="int8", ram="48MiB") as engine,
        pytest.raises(OverBudget, match="weights in work"),
    ):
        engine.plan(REQUEST)


def test_a_damaged_pack_in_the_cache_is_named(model: Path, cache: Path) -> None:
    result_of(model, cache, format="int8")
    (found,) = cached_packs(cache)
    (path,) = found.path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PenstockError, match="damaged"):
        result_of(model, cache, format="int8")


# --- fast


def test_fast_is_probed_stated_and_near_exact(packed: Path, expected: Tensor) -> None:
    with opened(packed, packed, compute="fast") as engine:
        plan = engine.plan(REQUEST)
        found = engine.submit(REQUEST).result()
    assert sum("8-bit products in" in told for told in found.report.notices) == 2
    works = any("in int8: they work here" in told for told in found.report.notices)
    assert plan.compute_path == found.report.compute_path == ("int8" if works else "dequant")
    assert plan.compute == found.report.compute == "fast"
    assert torch.equal(found.latents, expected) != works
    assert cosine_similarity(found.latents.flatten(), expected.flatten(), dim=0) > 0.99


def test_where_no_8_bit_product_works_weights_are_decoded(
    packed: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*operands: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with opened(packed, packed, compute="fast") as engine:
        assert engine.plan(REQUEST).compute_path == "dequant"
        found = engine.submit(REQUEST).result()
    assert torch.equal(found.latents, expected)
    assert any("not here, weights are decoded (no such kernel)" in t for t in found.report.notices)


@pytest.mark.parametrize(
    ("rowwise", "told"),
    [
        (PathReport(True, 0.999, ""), "they work here"),
        (
            PathReport(False, None, "sm120"),
            "they work here, scaled in passes of their own (sm120)",
        ),
    ],
)
def test_how_fp8_is_scaled_is_told(rowwise: PathReport, told: str) -> None:
    works, refused = PathReport(True, 0.999, ""), PathReport(False, None, "no kernel")
    assert variants.told_of({"fp8": works, "fp8-rowwise": rowwise, "int8": refused}) == (
        f"8-bit products in fp8: {told}",
        "8-bit products in int8: not here, weights are decoded (no kernel)",
    )


@pytest.mark.parametrize("wanted", ["int8", "fp8"])
def test_no_more_is_alive_than_a_fast_plan_reserves(
    tmp_path: Path, model: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small chunks and the smallest plan, so that nothing hides behind anything."""
    monkeypatch.setattr(variants, "Computing", partial(Computing, chunk_bytes=1 << 16))
    folder = pack(locate(model), wanted, tmp_path / "p").folder
    with opened(folder, folder, compute="fast") as engine:
        plan = least_plan(engine)
        labels = dict(plan["denoise"].work)
        if plan.compute_path == wanted:
            assert labels["8-bit workspace"] == 1 << 16
            assert "dequantisation scratch" not in labels
        with _meter(engine) as meter, _host_buffers_apart(meter):
            _run(engine, LEAST, plan, overlapped=True)
    assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)


def test_a_job_is_not_resumed_with_another_way_to_compute(tmp_path: Path, packed: Path) -> None:
    with opened(packed, packed) as engine:
        job = engine.submit(REQUEST, job_dir=tmp_path / "job")
        for event in job.events():
            if isinstance(event, Progress) and event.phase == "denoise":
                job.cancel()
        with pytest.raises(JobCancelled):
            job.result()
    with (
        opened(packed, packed, compute="fast") as engine,
        pytest.raises(FingerprintMismatch, match="compute"),
    ):
        engine.resume(tmp_path / "job")
