"""Guidance inside an interval of noise levels: a loop by hand, both ends of what may be asked, and
what the rest of a job makes of steps of two kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from penstock.batch.lines import read_lines
from penstock.engine.engine import Engine
from penstock.engine.families.wan.stretches import stretches_of
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import workload_of
from penstock.engine.request.levels import noise_levels
from penstock.engine.run.report import JobResult
from penstock.engine.run.stepplan import Recorded
from penstock.errors import RequestError
from penstock.profiles.caching import Caching
from penstock.profiles.plan import Plan, StreamPlan
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run
from tests.engine.running import a_request, an_engine, stop_at
from tests.makers import makers_levels, makers_unipc

SHIFT = 3.0
STEPS = 10
MIDDLE = "0.5,0.93"
"""Without the first two and the last two of these steps."""
REQUEST = a_request(
    steps=STEPS, shift=SHIFT, negative_prompt="blurry", guidance_scale=4.0, cfg_interval=MIDDLE
)


@pytest.fixture(scope="module")
def engine(t2v_folder: Path) -> Iterator[Engine]:
    with an_engine(t2v_folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def middle(engine: Engine) -> JobResult:
    return engine.submit(REQUEST).result()


def made(engine: Engine, **changes: Any) -> torch.Tensor:
    return engine.submit(replace(REQUEST, **changes)).result().latents


@torch.no_grad()
def test_it_is_a_loop_by_hand(t2v_folder: Path, middle: JobResult) -> None:
    pipe = WanPipeline.from_pretrained(t2v_folder)
    pipe.scheduler = makers_unipc(pipe.scheduler.config, SHIFT)
    texts = pipe.encode_prompt(REQUEST.prompt, REQUEST.negative_prompt, max_sequence_length=512)
    draw = torch.Generator().manual_seed(REQUEST.seed or 0)
    latents = torch.randn(middle.latents.shape, generator=draw)
    pipe.scheduler.set_timesteps(STEPS)
    inside = [0.5 <= level <= 0.93 for level in makers_levels(0.999, STEPS, SHIFT)]
    assert inside == [False] * 2 + [True] * 6 + [False] * 2
    for guided, moment in zip(inside, pipe.scheduler.timesteps, strict=True):
        towards, away = (
            pipe.transformer(latents, moment[None], text, return_dict=False)[0] for text in texts
        )
        velocity = away + 4.0 * (towards - away) if guided else towards
        latents = pipe.scheduler.step(velocity, moment, latents, return_dict=False)[0]
    assert (middle.latents - latents).abs().max() <= 1e-5 * latents.abs().max()


def test_the_whole_interval_is_guidance_and_an_empty_one_is_none(
    engine: Engine, middle: JobResult
) -> None:
    always, never = (
        made(engine, cfg_interval=None),
        made(engine, guidance_scale=1.0, cfg_interval=None),
    )
    assert torch.equal(made(engine, cfg_interval="0,1"), always)
    assert torch.equal(made(engine, cfg_interval="0,0"), never)
    assert not any(torch.equal(middle.latents, each) for each in (always, never))


def streamed(plan: Plan, branches: int) -> Plan:
    """All blocks from RAM at every pass."""
    assert plan["denoise"].stream is not None
    blocks = plan["denoise"].stream.n_blocks
    stream = StreamPlan(blocks, 0, blocks, device_slots=1)
    changed = (
        replace(phase, stream=stream, branches=branches) if phase.name == "denoise" else phase
        for phase in plan.phases
    )
    return replace(plan, phases=tuple(changed))


@pytest.mark.parametrize(("branches", "visits"), [(1, 2), (2, 1)])
def test_steps_without_guidance_move_the_weights_once(
    engine: Engine, middle: JobResult, branches: int, visits: int
) -> None:
    plan = streamed(engine.plan(REQUEST), branches)
    result = _run(engine, REQUEST, plan, overlapped=True)
    assert torch.equal(result.latents, middle.latents)
    denoise = next(phase for phase in result.report.phases if phase.name == "denoise")
    blocks = sum(layout.nbytes for layout in engine.model.transformer.blocks)
    used = [step.flow.device_to_compute.nbytes for step in denoise.steps]
    assert used == [blocks * times for times in [1] * 2 + [visits] * 6 + [1] * 2]
    # The ring is ahead of the computation, over the ends of steps; in the end nothing came in vain
    copied = sum(step.flow.host_to_device.nbytes for step in denoise.steps)
    assert copied <= sum(used) <= denoise.copied_bytes < sum(used) + blocks


def test_the_plan_counts_passes_and_seconds(t2v_folder: Path) -> None:
    def denoise(**changes: Any) -> Any:
        with an_engine(t2v_folder, branches="1") as opened:
            return opened.plan(replace(REQUEST, **changes))["denoise"]

    whole, half, none = (denoise(cfg_interval=each) for each in ("0,1", MIDDLE, "0,0"))
    assert whole == denoise(cfg_interval=None)
    assert none.seconds == denoise(guidance_scale=1.0, cfg_interval=None).seconds
    share = (half.seconds - none.seconds) / (whole.seconds - none.seconds)
    assert share == pytest.approx(0.6)
    assert half.forwards == (STEPS, STEPS)
    told = [[fact for fact in each.facts if "guidance" in fact] for each in (whole, half, none)]
    assert told[0][0].startswith("classifier-free guidance on")
    assert told[1][0].startswith("classifier-free guidance in 6 of 10 steps")
    assert told[2] == ["classifier-free guidance in none of 10 steps"]


def test_steps_that_are_computed_alike_leave_a_record(
    t2v_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    request = replace(REQUEST, steps=24, cfg_interval="0.8,1")
    on = sum(level >= 0.8 for level in noise_levels("unipc", 24, SHIFT))
    with an_engine(t2v_folder) as engine:
        engine.submit(request).result()
    written = tmp_path.glob("steps/*.json")
    assert sorted(len(Recorded.read(each).levels) for each in written) == sorted([on, 24 - on])
    with an_engine(t2v_folder, step_cache="plan:13") as engine:
        told = engine.submit(request).result().report.notices
    assert len([each for each in told if "from a run of this model" in each]) == 2


@pytest.mark.parametrize("word", ["off", "plan:13", "budget:0.05"])
def test_a_stopped_job_goes_on_to_the_bit(t2v_folder: Path, word: str, tmp_path: Path) -> None:
    request = replace(REQUEST, steps=24)
    with an_engine(t2v_folder, step_cache=word) as engine:
        plan, work = engine.plan(request), workload_of(request)
        with _meter(engine) as meter, _host_buffers_apart(meter):
            whole = _run(engine, request, plan, overlapped=True)
        assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
        manifest: Any = engine.model.manifest
        found = stretches_of(manifest, work, range(24), Caching.of(word), guided=True)
        starts = [each.steps.start for each in found]
        computed = whole.report.computed_steps
        assert [each.branches for each in found] == [1, 2, 1]
        assert set(starts) <= set(computed), "nothing is foretold from the other kind of steps"
        fewest, most = plan["denoise"].forwards
        assert fewest <= len(computed) <= most
        if word == "plan:13":
            assert fewest == most == 13
        for cut in (starts[1], starts[2] + 1):
            stop_at(cut, engine, request, tmp_path / f"{cut}")
            again = engine.resume(tmp_path / f"{cut}").result()
            assert torch.equal(again.latents, whole.latents)
            assert again.report.computed_steps == computed


def test_without_guidance_anywhere_the_record_is_another_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    for interval in ("0,0", None):
        made(engine, cfg_interval=interval)
    assert len(list(tmp_path.glob("steps/*.json"))) == 2


def test_of_two_transformers_one_may_be_without(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path, image_to_video=False, experts=True, seed=5, vae={"base_dim": 8}
    )
    request = replace(REQUEST, guidance_scale=3.0, guidance_high=4.0, steps=6, shift=12.0)
    with an_engine(folder) as engine:
        manifest: Any = engine.model.manifest
        high, low = manifest.split(workload_of(request))
        assert high >= 2 and low >= 2
        levels = noise_levels("unipc", 6, 12.0)
        only_high = replace(request, cfg_interval=f"{levels[high - 1]},1")
        plan = engine.plan(only_high)
        assert (plan["denoise"].branches, plan["denoise 2"].branches) == (2, 1)
        found = engine.submit(only_high).result().latents
        said = replace(request, cfg_interval=None, guidance_scale=1.0)
        assert torch.equal(found, engine.submit(said).result().latents)


def test_windows_have_the_same_steps(engine: Engine) -> None:
    request = replace(REQUEST, frames=17, window=9, overlap=4, steps=6)
    plan = engine.plan(request)
    assert plan["denoise"].windows > 1
    found = engine.submit(request).result().latents
    for visit in (1, 2, 4):
        other = streamed(plan, visit)
        assert torch.equal(_run(engine, request, other, overlapped=False).latents, found)
    none = replace(request, cfg_interval="0,0")
    assert torch.equal(
        engine.submit(none).result().latents,
        engine.submit(replace(none, cfg_interval=None, guidance_scale=1.0)).result().latents,
    )


@pytest.mark.parametrize(
    "word", ["", "0.3", "0.9,0.3", "-1,1", "0,1.1", "a,b", "0,1,1", "nan,1", 3]
)
def test_what_is_no_interval_is_refused(word: Any) -> None:
    with pytest.raises(RequestError, match="two noise levels"):
        replace(REQUEST, cfg_interval=word)


@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 1.0}, {"guidance_scale": 1.0, "nag_scale": 5.0}]
)
def test_without_guidance_there_is_no_interval_of_it(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="Leave --cfg-interval out"):
        replace(REQUEST, **changes)


def test_a_server_takes_it() -> None:
    pytest.importorskip("pydantic")  # of the extra "serve"
    from penstock.serve.fields import VideoFields, read_fields

    fields = read_fields(VideoFields, {"prompt": "a cat", "cfg_interval": MIDDLE})
    assert fields.settings["cfg_interval"] == MIDDLE


def test_a_list_takes_it(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"prompt": "a cat", "cfg_interval": "{MIDDLE}"}}\n')
    (line,), bad = read_lines(tmp_path / "list.jsonl", "model")
    assert line.settings.cfg_interval == MIDDLE and not bad
