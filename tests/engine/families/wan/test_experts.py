"""Two transformers, the one for much noise and then the one for little: as diffusers' pipelines
run them, streamed as resident, inside their plan, and across the swap after any stop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import penstock
from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.experts import PARTS
from penstock.engine.files.locate import Files
from penstock.engine.lora.file import Lora
from penstock.engine.request.generation import DISTILLED, GenerationRequest, workload_of
from penstock.engine.request.levels import noise_levels
from penstock.engine.run.events import PhaseStarted
from penstock.engine.run.jobs import describe
from penstock.engine.run.report import JobResult
from penstock.engine.run.stepplan import Recorded
from penstock.errors import NotRun, RequestError
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan, StreamPlan
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run
from tests.engine.running import an_engine, stop_after_a_step, stop_at
from tests.makers import made_by_diffusers

STEPS = 6
SHIFT = {False: 12.0, True: 5.0}


def _model(folder: Path, *, pictured: bool) -> Path:
    return write_tiny_model(
        folder, image_to_video=pictured, experts=True,
        seed=5, vae={"base_dim": 8}, transformer={"num_layers": 4},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the two models the one that takes a picture."""
    return _model(tmp_path_factory.mktemp("a14b"), pictured=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with an_engine(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def asked(picture: Path) -> GenerationRequest:
    return GenerationRequest(
        prompt="a red circle", negative_prompt="blurry", image=picture, width=48, height=32,
        frames=9, steps=STEPS, seed=7, guidance_scale=3.0, guidance_high=4.0, fit="stretch",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(engine: Engine, asked: GenerationRequest) -> JobResult:
    return engine.submit(asked).result()


def _theirs(folder: Path, request: GenerationRequest, last: Path | None = None) -> dict[str, Any]:
    high, low = request.guidance_scales
    return made_by_diffusers(
        folder, request, SHIFT[request.image is not None], last,
        guidance_scale=high, guidance_scale_2=low,
    )  # fmt: skip


def _assert_theirs(result: JobResult, theirs: dict[str, Any]) -> None:
    latents = theirs["latent"]
    assert (result.latents - latents).abs().max() <= 1e-5 * latents.abs().max()
    frames = np.round(theirs["np"][0] * 255)
    assert np.abs(result.video.numpy().astype(int) - frames).max() <= 1


def test_the_job_is_that_of_diffusers(
    folder: Path, engine: Engine, asked: GenerationRequest, whole: JobResult
) -> None:
    high, low = engine.model.manifest.split(workload_of(asked))
    assert high >= 2 and low >= 2
    _assert_theirs(whole, _theirs(folder, asked))


def test_the_job_of_a_prompt_alone_is_that_of_diffusers(
    asked: GenerationRequest, tmp_path: Path
) -> None:
    folder, request = _model(tmp_path, pictured=False), replace(asked, image=None)
    with an_engine(folder) as engine:
        assert dict(engine.model.official.request_defaults)["guidance_high"] == 4.0
        assert engine.model.official.flow_shift(1280, 720, None) == SHIFT[False]
        with pytest.raises(RequestError, match="text-to-video"):
            engine.plan(asked)
        result = engine.submit(request).result()
    _assert_theirs(result, _theirs(folder, request))


def test_both_guidances_count(engine: Engine, asked: GenerationRequest, whole: JobResult) -> None:
    for changes in ({"guidance_scale": 4.0}, {"guidance_high": 1.0}):
        other = engine.submit(replace(asked, **changes)).result()
        assert not torch.allclose(other.latents, whole.latents, atol=1e-4)


def test_a_video_may_end_with_a_picture(
    folder: Path, engine: Engine, asked: GenerationRequest, tmp_path: Path
) -> None:
    last = tmp_path / "last.png"
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(last)
    result = engine.submit(replace(asked, last_image=last)).result()
    _assert_theirs(result, _theirs(folder, asked, last))


def _placed(plan: Plan, stream: StreamPlan) -> Plan:
    changed = (
        replace(phase, stream=stream, branches=1, chunk_tokens=10**6)
        if phase.name in ("denoise", "denoise 2")
        else phase
        for phase in plan.phases
    )
    return replace(plan, phases=tuple(changed))


def test_streamed_is_resident_is_sequential(
    engine: Engine, asked: GenerationRequest, whole: JobResult
) -> None:
    plan = engine.plan(asked)
    for stream, overlapped in ((StreamPlan(4, 4), False), (StreamPlan(4, 1, 1, 1, 1), True)):
        found = _run(engine, asked, _placed(plan, stream), overlapped)
        assert torch.equal(found.latents, whole.latents)
        assert torch.equal(found.video, whole.video)


def test_nothing_passes_the_plan(engine: Engine, asked: GenerationRequest) -> None:
    plan = engine.plan(asked)
    with _meter(engine) as meter, _host_buffers_apart(meter):
        result = _run(engine, asked, plan, overlapped=True)
    assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
    assert [phase.name for phase in result.report.phases] == [
        phase.name for phase in plan.phases if phase.name != "mux"
    ]
    for phase, promised in zip(result.report.phases, plan.phases, strict=False):
        assert phase.measured_vram_bytes <= promised.vram_bytes
        assert phase.measured_ram_bytes <= promised.ram_bytes


@pytest.mark.parametrize("around", [-1, 0, 1])
def test_a_job_stopped_around_the_swap_goes_on(
    around: int, engine: Engine, asked: GenerationRequest, whole: JobResult, tmp_path: Path
) -> None:
    high, _ = engine.model.manifest.split(workload_of(asked))
    stop_at(high + around, engine, asked, tmp_path / "job")
    done = describe(tmp_path / "job").step
    again = engine.resume(tmp_path / "job")
    begun = [event.phase for event in again.events() if isinstance(event, PhaseStarted)]
    result = again.result()
    assert torch.equal(result.latents, whole.latents)
    assert torch.equal(result.video, whole.video)
    assert ("denoise" in begun) == (done < high)  # what is done is not loaded again


def test_each_transformer_is_read_once_and_the_second_one_early(
    folder: Path, asked: GenerationRequest
) -> None:
    """Where RAM has room, the second one's blocks are read from the last step of the first on."""
    with an_engine(folder, ram="60MiB") as engine:
        plan = engine.plan(asked)
        assert plan["denoise"].prefetched_next_bytes
        assert plan["context 2"].prefetched_next_bytes
        result = _run(engine, asked, plan, overlapped=True)
    reads = {phase.name: phase.read_bytes for phase in result.report.phases}
    for name, part in zip(("denoise", "denoise 2"), engine.model.components(), strict=False):
        assert sum(layout.nbytes for layout in part.blocks) <= reads[name] <= plan[name].read_bytes


def test_one_step_needs_one_transformer(engine: Engine, asked: GenerationRequest) -> None:
    plan = engine.plan(replace(asked, steps=1))
    assert "denoise 2" not in [phase.name for phase in plan.phases]
    assert torch.isfinite(engine.submit(replace(asked, steps=1)).result().latents).all()


def test_the_makers_settings(engine: Engine) -> None:
    official = engine.model.official
    defaults = dict(official.request_defaults)
    assert (defaults["steps"], defaults["guidance_scale"]) == (40, 3.5)
    assert "guidance_high" not in defaults
    assert official.flow_shift(1280, 720, None) == SHIFT[True]


def test_load_pipeline_names_what_it_does_not_open(folder: Path, tmp_path: Path) -> None:
    """Before it packs anything."""
    files = Files(transformer=folder / "transformer", transformer_2=folder / "transformer_2")
    with (
        mock.patch("penstock.engine.attach.pipe._stored_as", side_effect=AssertionError),
        pytest.raises(NotRun, match="load_pipeline"),
    ):
        penstock.load_pipeline(folder, device="cpu", files=files, format="int8")


@pytest.mark.parametrize("format", [None, "int8"])
def test_load_pipeline_streams_both_as_diffusers_runs_them(
    folder: Path, asked: GenerationRequest, format: str | None
) -> None:
    """To the bit where the bytes lie as the stream lays them: a kernel rounds by alignment."""

    def latents(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        made: torch.Tensor = pipe(
            image=Image.open(asked.image), prompt="a red circle", negative_prompt="blurry",
            height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=3.5,
            guidance_scale_2=3.0, generator=torch.Generator().manual_seed(1), output_type="latent",
        ).frames  # fmt: skip
        return made

    pipe = penstock.load_pipeline(folder, vram="8MiB", ram="8MiB", device="cpu", format=format)
    found = latents(pipe)
    report = vars(pipe)["_penstock_attached"].report
    assert report.peak_vram_bytes <= 8 << 20 and report.peak_ram_bytes <= 8 << 20
    assert report.copied_bytes > 0
    whole = type(pipe).from_pretrained(folder)
    penstock.detach(pipe)
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        for weight in getattr(whole, name).parameters():
            weight.data = weight.data.clone()
    theirs = latents(whole)
    if format is None:
        assert torch.equal(found, theirs)
    else:
        assert 0 < (found - theirs).abs().mean() < 0.1 * theirs.abs().mean()


def test_two_scales_are_of_two_transformers(t2v_folder: Path, asked: GenerationRequest) -> None:
    with an_engine(t2v_folder) as plain, pytest.raises(RequestError, match="one transformer"):
        plain.plan(replace(asked, image=None))


def test_packs_are_made_of_both(
    folder: Path, asked: GenerationRequest, whole: JobResult, tmp_path: Path
) -> None:
    with Engine.open(
        folder, options=Options(device="cpu", vram="200MiB", ram="200MiB", format="int8"),
        cache=tmp_path,
    ) as engine:  # fmt: skip
        result = engine.submit(asked).result()
        again = engine.submit(asked).result()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    assert torch.equal(result.latents, again.latents)
    assert not torch.equal(result.latents, whole.latents)
    assert (result.latents - whole.latents).abs().mean() < 0.1 * whole.latents.abs().mean()


@pytest.mark.parametrize("cache", ["plan:9", "budget:0.05"])
def test_each_transformer_has_its_own_step_cache(
    cache: str, folder: Path, asked: GenerationRequest, tmp_path: Path
) -> None:
    request = replace(asked, steps=20)
    with an_engine(folder, step_cache=cache) as engine:
        first, second = engine.model.manifest.split(workload_of(request))
        plan, whole = engine.plan(request), engine.submit(request).result()
        computed = whole.report.computed_steps
        for name, own in (("denoise", range(first)), ("denoise 2", range(first, 20))):
            fewest, most = plan[name].forwards
            assert fewest <= len([step for step in computed if step in own]) <= most
            assert {own[0], own[-1]} <= set(computed)
        assert len(computed) < 20
        stop_at(first + 2, engine, request, tmp_path / "job")
        again = engine.resume(tmp_path / "job").result()
    assert torch.equal(again.latents, whole.latents)
    assert again.report.computed_steps == computed


def test_a_record_that_is_left_meanwhile_changes_no_job_that_goes_on(
    folder: Path, asked: GenerationRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    request = replace(asked, steps=20)
    with an_engine(folder, step_cache="plan:9") as engine:
        whole = engine.submit(request).result()
        stop_after_a_step(engine, request, tmp_path / "job")
    with an_engine(folder) as engine:
        engine.submit(request).result()
    assert len(list(tmp_path.glob("cache/steps/*.json"))) == 2
    with an_engine(folder, step_cache="plan:9") as engine:
        again = engine.resume(tmp_path / "job").result()
        fresh = engine.submit(request).result()
    assert torch.equal(again.latents, whole.latents)
    assert again.report.computed_steps == whole.report.computed_steps
    assert fresh.report.computed_steps != whole.report.computed_steps  # the records are of use


def test_each_transformer_leaves_a_record_of_its_own_steps(
    folder: Path, asked: GenerationRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    request = replace(asked, steps=20)
    with an_engine(folder) as engine:
        first, _ = engine.model.manifest.split(workload_of(request))
        stop_at(first + 2, engine, request, tmp_path / "job")
        engine.resume(tmp_path / "job").result()
        (own,) = tmp_path.glob("cache/steps/*.json")  # the other's steps were not seen in one go
        engine.submit(request).result()
    (low,) = set(tmp_path.glob("cache/steps/*.json")) - {own}
    levels = (*Recorded.read(own).levels, *Recorded.read(low).levels)
    assert levels == pytest.approx(noise_levels("unipc", 20, SHIFT[True]))
    assert len(Recorded.read(own).levels) == first

    def own_runs(model: Path) -> int:
        with an_engine(model, step_cache="plan:9") as engine:
            told = engine.submit(request).result().report.notices
        return len([notice for notice in told if "from a run of this model" in notice])

    assert own_runs(folder) == 2
    other = shutil.copytree(folder, tmp_path / "other")
    (weights,) = other.glob("transformer_2/*.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
    assert own_runs(other) == 0


def _lora(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of two matrices of every block, and what it adds to them by their names."""
    draw, tensors, added = torch.Generator().manual_seed(seed), {}, {}
    for block in range(4):
        for theirs, ours in (("self_attn.q", "attn1.to_q"), ("ffn.0", "ffn.net.0.proj")):
            out, width = (224 if theirs == "ffn.0" else 96), 96
            down = torch.randn(2, width, generator=draw)
            up = 0.05 * torch.randn(out, 2, generator=draw)
            name = f"diffusion_model.blocks.{block}.{theirs}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            added[f"blocks.{block}.{ours}.weight"] = up @ down
    save_file(tensors, path)
    return added


def test_a_pair_of_4_step_loras_is_as_if_merged(
    folder: Path, asked: GenerationRequest, tmp_path: Path
) -> None:
    """Each in its own transformer, under the levels of a distilled model and without guidance."""
    pair = {"high": tmp_path / "x4.safetensors", "low": tmp_path / "y4.safetensors"}
    merged = shutil.copytree(folder, tmp_path / "merged")
    for seed, part in enumerate(PARTS):
        added = _lora(pair[PARTS[part]], seed)
        (weights,) = (merged / part).glob("*.safetensors")
        tensors = load_file(weights)
        save_file(tensors | {n: tensors[n] + more for n, more in added.items()}, weights)
    four = replace(asked, guidance_high=1.0, **DISTILLED)

    def made(model: Path, **expert_of: str) -> torch.Tensor:
        loras = [Lora.parse(f"{pair[name]}@{expert}") for name, expert in expert_of.items()]
        with an_engine(model, loras=loras) as engine:
            split = engine.model.manifest.split(workload_of(four))
            assert len(split) == 2 and min(split) > 0 and sum(split) == 4
            return engine.submit(four).result().latents

    beside, folded = made(folder, high="high", low="low"), made(merged)
    scale = folded.abs().max()
    assert (beside - folded).abs().max() <= 1e-5 * scale  # sums in another order
    for other in (made(folder), made(folder, high="low", low="high")):
        assert (other - folded).abs().max() > 1e-3 * scale
