"""Skipped steps: which they are, what takes their place, and that a resume skips the same."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock.engine.engine import Engine
from penstock.engine.lora.file import Lora
from penstock.engine.model.opening import Opening
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.levels import noise_levels
from penstock.engine.run import stepplan, steprecord
from penstock.engine.run.pipeline import work_of
from penstock.engine.run.report import JobResult
from penstock.engine.run.sampler import Sampler, SamplerState
from penstock.engine.run.stage import Stage
from penstock.engine.run.stepcache import Budget, Planned, StepCache, shares_of
from penstock.engine.run.stepplan import (
    Recorded,
    Schedule,
    best_schedule,
    left_of_errors,
    shared_forwards,
)
from penstock.errors import CheckpointError, FingerprintMismatch, ProfileError
from penstock.profiles.caching import MOST_SKIPPED, Caching
from penstock.profiles.plan import Plan
from tests.engine.run.test_budget import _host_buffers_apart, _meter
from tests.engine.running import a_request, an_engine, stop_at

STEPS = 10
REQUEST = a_request(steps=STEPS)
CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "solver_order": 2}


def run(folder: Path, **options: Any) -> JobResult:
    with an_engine(folder, **options) as engine:
        return engine.submit(REQUEST).result()


@pytest.fixture(scope="module")
def off(t2v_folder: Path) -> JobResult:
    return run(t2v_folder)


def levels(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps)]


def test_off_is_the_default_and_computes_every_step(t2v_folder: Path, off: JobResult) -> None:
    same = run(t2v_folder, step_cache="off")
    assert torch.equal(same.latents, off.latents)
    assert off.report.computed_steps == tuple(range(STEPS))


@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler"])
def test_shares_are_what_each_velocity_adds(sampler: str) -> None:
    def fresh() -> Sampler:
        return Sampler(CONFIG, sampler=sampler, steps=6, shift=5.0)

    draw = torch.Generator().manual_seed(1)
    velocities = torch.randn(6, 1, 2, 1, 1, 1, generator=draw, dtype=torch.float64)
    latents, solver = torch.zeros(1, 2, 1, 1, 1, dtype=torch.float64), fresh()
    for step in range(6):
        latents = solver.step(velocities[step], step, latents)
    shares = torch.tensor(shares_of(fresh()), dtype=torch.float64)
    expected = -(shares.view(-1, 1, 1, 1, 1, 1) * velocities).sum(0)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)  # sigmas are fp32


def test_a_solver_that_adds_noise_counts_as_eulers_method() -> None:
    lcm = Sampler(CONFIG, sampler="lcm", steps=6, shift=5.0, distilled=True)
    after = [*(lcm.sigma(step) for step in range(1, 6)), 0.0]
    steps = [lcm.sigma(step) - level for step, level in enumerate(after)]
    assert shares_of(lcm) == pytest.approx(steps)


def test_an_error_that_the_solver_takes_back_is_seen_between_and_counts() -> None:
    # By hand: half of share and step in noise, less what later steps undo of it.
    left = left_of_errors((1.0, 0.5, 0.2), (0.1, 0.0, -0.4))
    assert left == pytest.approx((0.3 * 0.35, 0.15 * 0.675, 0.3 * 0.87))


def test_a_skipped_step_lies_on_the_line_through_the_last_two() -> None:
    cache = StepCache(range(6), Planned(Schedule((0, 2, 5), (0.0, 0.5, 0.0))))
    one, other = torch.randn(2, 1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert cache.wants(0)
    cache.computed(0, one, one)
    assert not cache.wants(1)
    assert torch.equal(cache.predicted(1), one)  # there is no line yet
    assert cache.wants(2)
    cache.computed(2, other, one)
    expected = other + 0.5 * (3 - 2) / (2 - 0) * (other - one)
    torch.testing.assert_close(cache.predicted(3), expected)
    expected = other + 0.5 * (4 - 2) / (2 - 0) * (other - one)
    torch.testing.assert_close(cache.predicted(4), expected)
    assert [cache.wants(step) for step in (3, 4, 5)] == [False, False, True]
    assert cache.computed_steps == [0, 2]


def test_what_a_cache_keeps_is_its_own() -> None:
    cache = StepCache(range(4), Planned(Schedule((0, 3), (0.0, 0.0))))
    velocity = torch.ones(1)
    cache.computed(0, velocity, torch.ones(1))
    velocity.zero_()  # as a solver may
    assert cache.predicted(1) == 1


def test_a_steered_job_leaves_no_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steprecord, "record_path", lambda stage, steps: tmp_path / "run.json")
    cache: Any = SimpleNamespace(steps=range(2), samples=[torch.ones(4), torch.zeros(4)])
    sampler: Any = SimpleNamespace(sigma=(1.0, 0.5).__getitem__)
    for steered in (True, False):
        stage: Any = SimpleNamespace(keeper=SimpleNamespace(steered=steered))
        steprecord.keep_record(stage, cache, sampler)
        assert (tmp_path / "run.json").exists() != steered


def test_nothing_is_foretold_after_a_reset() -> None:
    cache = StepCache(range(4), Planned(Schedule((0, 3), (0.0, 0.0))))
    cache.computed(0, torch.ones(1), torch.ones(1))
    assert not cache.wants(1)
    cache.reset()
    assert cache.wants(2)


def followed(velocities: torch.Tensor, budget: float, left: list[float] | None = None) -> list[int]:
    steps = len(velocities)
    rule = Budget(budget, levels(steps), [1 / steps] * steps if left is None else left)
    cache = StepCache(range(steps), rule)
    for step in range(steps):
        if cache.wants(step):
            cache.computed(step, velocities[step], torch.ones(4))
        else:
            cache.predicted(step)
    return cache.computed_steps


def test_a_budget_is_spent_where_the_velocity_bends() -> None:
    line = torch.arange(20.0)[:, None] * torch.ones(4) / 20
    bent = line.clone()
    bent[6:] += 0.5 * torch.arange(14.0)[:, None].sin()
    straight, turning = followed(line, 0.01), followed(bent, 0.01)
    assert straight[-1] == turning[-1] == 19  # the last is always computed
    assert len(straight) < len(turning)
    gaps = [n - a for a, n in zip(straight, straight[1:], strict=False)]
    assert max(gaps) == MOST_SKIPPED + 1
    assert [step for step in turning if step < 6] == [step for step in straight if step < 6]


def test_a_smaller_budget_computes_more() -> None:
    wave = torch.linspace(0, 6, 30).sin()[:, None] * torch.ones(4)
    assert len(followed(wave, 1e-9)) == 30
    assert len(followed(wave, 1e-9)) > len(followed(wave, 3e-3)) > len(followed(wave, 1.0))


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(0.0049, [True]), (0.0051, [False, True]), (0.0199, [False, True]), (0.0201, [False, False])],
)
def test_what_a_budget_spends_by_hand(budget: float, wanted: list[bool]) -> None:
    rule = Budget(budget, levels(10), [0.5] * 10)
    rule.learns(0, None, 2.0)
    rule.learns(1, 0.003, 2.0)  # a bend of 0.003 / (0.1 * 0.03) = 1
    # 0.5 * 1 * 0.1 * 0.2 / 2 at the next step, and 0.5 * 1 * 0.2 * 0.3 / 2 at the one after it
    assert [rule.wants(2 + step) for step in range(len(wanted))] == wanted


def test_without_latents_to_compare_with_a_budget_computes() -> None:
    rule = Budget(1.0, levels(10), [0.5] * 10)
    rule.learns(0, None, 0.0)
    rule.learns(1, 0.1, 0.0)
    assert rule.wants(2)


def test_a_budget_computes_the_last_step_of_its_transformer() -> None:
    rule = Budget(1.0, levels(16), [0.1] * 16, 7)
    rule.learns(0, None, 1.0)
    rule.learns(1, 0.0, 1.0)
    assert [rule.wants(step) for step in range(2, 8)] == [False] * 5 + [True]


def test_a_budget_draws_a_line_on_with_less_of_its_slope() -> None:
    cache = StepCache(range(8), Budget(1.0, levels(8), [0.1] * 8))
    for step, value in enumerate((1.0, 3.0)):
        cache.computed(step, torch.tensor([value]), torch.ones(1))
    found = [float(cache.predicted(step)) for step in (2, 3, 4)]
    assert found == pytest.approx([3 + 2, 3 + 0.75 * 4, 3 + 0.75 * 6])


def test_a_step_is_weighed_by_what_is_left_of_its_own_error() -> None:
    wave = torch.linspace(0, 6, 12).sin()[:, None] * torch.ones(4)
    left = [1e6 if step == 6 else 0.0 for step in range(12)]
    assert followed(wave, 1.0, left) == [0, 1, 6, 11]


def test_a_cache_goes_on_from_its_state_alone() -> None:
    wave = torch.linspace(0, 6, 16).sin()[:, None] * torch.ones(4)
    whole = StepCache(range(16), Budget(0.01, levels(16), [1 / 16] * 16))
    parts = StepCache(range(16), Budget(0.01, levels(16), [1 / 16] * 16))
    skipped = 0
    for step in range(16):
        state = parts.state()
        parts = StepCache(range(16), Budget(0.01, levels(16), [1 / 16] * 16))
        parts.load_state(SamplerState(state.values | {"next_step": step}, dict(state.tensors)))
        wanted = whole.wants(step)
        assert parts.wants(step) == wanted
        for cache in (whole, parts):
            if wanted:
                cache.computed(step, wave[step], torch.ones(4))
        if not wanted:
            skipped += 1
            assert torch.equal(whole.predicted(step), parts.predicted(step))
    assert skipped
    assert whole.computed_steps == parts.computed_steps


def recorded(steps: int) -> Recorded:
    draw = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 64, generator=draw)
    times = torch.tensor(levels(steps))
    velocities = times.cos()[:, None] * one + (4 * times).exp()[:, None] * other / 50
    return Recorded.of(levels(steps), list(velocities))


def cost(run: Recorded, left: list[float], schedule: Schedule) -> float:
    """By definition: the squared error of each gap's predictions together, gap by gap."""
    total, before = 0.0, -1
    pairs = zip(schedule.computed, schedule.computed[1:], schedule.damping, strict=False)
    for a, n, damping in pairs:
        coefficients = np.zeros(len(run.levels))
        for step in range(a + 1, n):
            slope = damping * (step - a) / (a - before) if before >= 0 else 0.0
            coefficients[step] += left[step]
            coefficients[a] -= left[step] * (1 + slope)
            if before >= 0:
                coefficients[before] += left[step] * slope
        total += float(coefficients @ run.products @ coefficients)
        before = a
    return total


def drawn(steps: int) -> Recorded:
    """Velocities that no line foretells: nothing is taken of many a slope."""
    draw = torch.Generator().manual_seed(2)
    return Recorded.of(levels(steps), list(torch.randn(steps, 3, generator=draw)))


def growing(steps: int) -> Recorded:
    """Velocities that run ahead of every line: all is taken of its slope."""
    draw = torch.Generator().manual_seed(2)
    faster = (-6 * torch.tensor(levels(steps))).exp()[:, None]
    return Recorded.of(levels(steps), list(faster * torch.randn(64, generator=draw)))


@pytest.mark.parametrize("run", [recorded(9), drawn(9), growing(9)], ids=["bent", "drawn", "grow"])
def test_no_schedule_of_as_many_forwards_is_better(run: Recorded) -> None:
    from itertools import combinations

    left = [0.1, 0.2, 0.1, 0.1, 0.1, 0.2, 0.1, 0.3, 0.1]
    best = best_schedule(run, left, 5)
    assert all(0 <= each <= 1 for each in best.damping)
    assert len(best.computed) == 5
    assert (best.computed[0], best.computed[-1]) == (0, 8)
    tried = [
        cost(run, left, Schedule((0, *inner, 8), (0.0, d1, d2, d3, 0.0)))
        for inner in combinations(range(1, 8), 3)
        for d1 in (0.0, 0.5, 1.0)
        for d2 in (0.0, 0.5, 1.0)
        for d3 in (0.0, 0.5, 1.0)
    ]
    assert cost(run, left, best) <= min(tried) * (1 + 1e-9)


@pytest.mark.parametrize("run", [recorded(12), drawn(12)], ids=["bent", "drawn"])
@pytest.mark.parametrize("computed", [(0, 3, 4, 9, 11), (0, 11), (0, 1, 11), tuple(range(12))])
def test_what_a_gap_costs_is_what_its_predictions_miss(
    run: Recorded, computed: tuple[int, ...]
) -> None:
    left = [0.1 + 0.01 * step for step in range(12)]
    gaps = stepplan._Gaps(run, left)
    found = [
        gaps.between(*three)
        for three in zip((-1, *computed), computed, computed[1:], strict=False)
    ]  # fmt: skip
    schedule = Schedule(computed, (*(damping for _, damping in found), 0.0))
    assert sum(error for error, _ in found) == pytest.approx(cost(run, left, schedule), rel=1e-9)


def test_steps_that_hardly_change_are_skipped_in_wide_gaps() -> None:
    late = torch.linspace(-2, 1, 40).clamp(min=0).square()[:, None] * torch.randn(
        64, generator=torch.Generator().manual_seed(5)
    )
    run = Recorded.of(levels(40), list(late + 1e-3 * torch.linspace(0, 1, 40).sin()[:, None]))
    computed = best_schedule(run, [1 / 40] * 40, 7).computed
    assert computed[1] - computed[0] > 7  # an even gap
    assert computed[-1] - computed[-2] < 7


@pytest.mark.parametrize(("steps", "forwards"), [(40, 2), (40, 6), (12, 12), (9, 8)])
def test_a_schedule_has_exactly_so_many_forwards(steps: int, forwards: int) -> None:
    schedule = best_schedule(recorded(steps), [1 / steps] * steps, forwards)
    assert len(schedule.computed) == len(schedule.damping) == forwards
    assert schedule.computed == tuple(sorted({0, *schedule.computed, steps - 1}))


def test_a_record_is_read_again_and_serves_other_levels(tmp_path: Path) -> None:
    run = recorded(12)
    run.write(tmp_path / "there" / "run.json")
    again = Recorded.read(tmp_path / "there" / "run.json")
    np.testing.assert_allclose(again.products, run.products, rtol=1e-8)
    np.testing.assert_allclose(again.at(run.levels).products, again.products)
    halves = again.at(levels(24))
    np.testing.assert_allclose(halves.products[::2, ::2], again.products)
    assert halves.products[-1, -1] == again.products[-1, -1]  # below the lowest


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"levels": [1.0, 0.5], "products": [1, 2]}', '{"levels": [0.5, 1.0], '
     '"products": [1, 2, 3]}', '{"levels": [1.0, 0.5], "products": [1, NaN, 3]}',
     '{"levels": [1.0], "products": [1]}', '{"levels": [1.0, 0.0], "products": [1, 2, 3]}',
     '{"levels": [1.5, 0.5], "products": [1, 2, 3]}',
     '{"levels": [1.0, 0.5], "products": ["1", "2", "3"]}',
     '{"levels": ["1.0", "0.5"], "products": [1, 2, 3]}',
     '{"levels": {"1.0": 1, "0.5": 1}, "products": [1, 2, 3]}',
     '{"levels": [1.0, 0.5], "products": [true, true, true]}',
     '{"levels": [1.0, 0.5], "products": [1, 2, 1e200]}', '{"levels": [1.0, 0.5]}',
     '{"levels": [1.0, 0.5], "products": [1, 2, ' + "9" * 400 + "]}"],
)  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError):
        Recorded.read(tmp_path / "run.json")


@pytest.fixture(scope="module", params=["plan:5", "budget:0.05"])
def cached(request: pytest.FixtureRequest, t2v_folder: Path) -> tuple[str, JobResult]:
    return request.param, run(t2v_folder, step_cache=request.param)


def test_a_job_computes_what_the_report_says(
    t2v_folder: Path, off: JobResult, cached: tuple[str, JobResult]
) -> None:
    word, result = cached
    computed = result.report.computed_steps
    fewest, most = Caching.of(word).forwards(STEPS)
    assert fewest <= len(computed) <= most
    assert len(computed) < STEPS
    assert computed[-1] == STEPS - 1
    assert not torch.equal(result.latents, off.latents)
    denoise = next(phase for phase in result.report.phases if phase.name == "denoise")
    moving = [step.flow.device_to_compute.nbytes > 0 for step in denoise.steps]
    assert [step for step, moved in enumerate(moving) if moved] == list(computed)
    assert denoise.predicted_vram_bytes >= denoise.measured_vram_bytes


@pytest.mark.parametrize("word", ["plan:5", "budget:0.05"])
def test_a_resumed_job_skips_the_same_steps(t2v_folder: Path, word: str, tmp_path: Path) -> None:
    with an_engine(t2v_folder, step_cache=word) as engine:
        whole = engine.submit(REQUEST).result()
        computed = whole.report.computed_steps
        skipped = next(s for s in range(1, STEPS) if s not in computed and s - 1 in computed)
        for cut in (skipped, skipped + 1):  # before the skipped step, and after it
            stop_at(cut, engine, REQUEST, tmp_path / str(cut))
            again = engine.resume(tmp_path / str(cut)).result()
            assert torch.equal(again.latents, whole.latents)
            assert again.report.computed_steps == computed


def test_a_job_is_resumed_under_its_own_cache_only(t2v_folder: Path, tmp_path: Path) -> None:
    with an_engine(t2v_folder, step_cache="plan:5") as engine:
        stop_at(2, engine, REQUEST, tmp_path / "job")
    with (
        an_engine(t2v_folder, step_cache="plan:6") as engine,
        pytest.raises(FingerprintMismatch, match="cache"),
    ):
        engine.resume(tmp_path / "job")


def test_few_steps_are_all_computed_and_it_is_said(t2v_folder: Path) -> None:
    with an_engine(t2v_folder, step_cache="plan:2") as engine:
        report = engine.submit(a_request(steps=4)).result().report
    assert report.computed_steps == (0, 1, 2, 3)
    assert any("gains nothing with 4 steps" in notice for notice in report.notices)


def test_a_whole_job_records_and_the_next_plan_is_made_from_it(
    t2v_folder: Path, off: JobResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    before = run(t2v_folder, step_cache="plan:5").report
    assert any("the small model in the box" in notice for notice in before.notices)
    assert not list(tmp_path.rglob("*.json"))  # a job that skips records nothing
    run(t2v_folder)
    (record,) = tmp_path.rglob("*.json")
    assert len(Recorded.read(record).levels) == STEPS
    after = run(t2v_folder, step_cache="plan:5").report
    assert any("a run of this model" in notice for notice in after.notices)
    record.write_text('{"levels": [1')
    again = run(t2v_folder, step_cache="plan:5").report
    assert any(str(record) in notice for notice in again.notices)
    assert any("the small model in the box" in notice for notice in again.notices)
    run(t2v_folder)
    assert len(Recorded.read(record).levels) == STEPS


def prepared_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str, steps: range, job: int, asked: int
) -> tuple[StepCache, list[str]]:
    """The cache of ``steps`` in a job of so many, and what is said of it."""
    told: list[str] = []
    stage: Any = SimpleNamespace(
        monitor=SimpleNamespace(notice=told.append),
        job=SimpleNamespace(request=SimpleNamespace(steps=asked), sources={"transformer": 1}),
    )
    monkeypatch.setattr(steprecord, "record_path", lambda stage, steps: tmp_path / "none.json")
    state = SamplerState({"next_step": steps.start}, {})

    def fresh() -> Sampler:
        return Sampler(CONFIG, sampler="euler", steps=job, shift=5.0)

    return steprecord.cache_for(stage, steps, Caching.of(word), fresh, state), told


@pytest.mark.parametrize(
    ("steps", "job", "records"),
    [(range(10), 10, True), (range(9), 20, True), (range(7), 7, False), (range(101), 101, False)],
)
def test_a_record_is_promised_of_jobs_that_leave_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: range, job: int, records: bool
) -> None:
    # MiniMax-H3's steps are one fewer than are asked for
    cache, _ = prepared_cache(monkeypatch, tmp_path, "off", steps, job, asked=job + 1)
    cache.computed(0, torch.ones(4), torch.ones(4))
    assert bool(cache.samples) == records
    _, told = prepared_cache(monkeypatch, tmp_path, "plan:4", steps, job, asked=job + 1)
    assert any("records this one" in notice for notice in told) == records


def test_a_part_of_a_job_is_scheduled_by_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, _ = prepared_cache(monkeypatch, tmp_path, "plan:4", range(10, 20), 20, asked=20)
    noise = [*noise_levels("euler", 20, 5.0), 0.0]
    steps = [level - after for level, after in zip(noise, noise[1:], strict=False)]
    left = left_of_errors(noise[:20], steps)[10:]
    built_in = Recorded.read(Path(penstock.__file__).with_name("assets") / "steps.json")
    best = best_schedule(built_in.at(noise[10:20]), left, 4)
    found = cache.state().values["cache"]["rule"]
    assert found["computed"] == [10 + step for step in best.computed]
    assert found["damping"] == pytest.approx(list(best.damping), rel=1e-4)


def test_what_changes_a_models_velocities_has_a_record_of_its_own() -> None:
    def path(loras: tuple[Lora, ...] = (), steps: range = range(10), **changes: Any) -> Path:
        own: Any = SimpleNamespace(
            streaming=("transformer",), opening=Opening("there", loras=loras)
        )
        job = SimpleNamespace(request=a_request(steps=20, **changes), model=own, sources={})
        stage: Any = SimpleNamespace(job=job, model=SimpleNamespace(flow_shift=lambda *of: of[2]))
        return steprecord.record_path(stage, steps)

    lora = Lora(Path("soft.safetensors"))
    others = [
        path(), path(steps=range(10, 20)), path(sampler="euler"), path(cfg_interval="0.5,1"),
        path(guidance_scale=1.0), path(guidance_scale=1.0, nag_scale=5.0), path(shift=4.0),
        path((lora,)), path((replace(lora, strength=0.5),)), path((replace(lora, expert="low"),)),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert path(seed=9, prompt="another", frames=9) == path()


def test_what_is_said_of_a_part_of_a_job_names_its_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, (told,) = prepared_cache(monkeypatch, tmp_path, "plan:4", range(10, 20), 20, asked=20)
    assert told == (
        "6 of steps 11 to 20 are skipped, chosen from runs of the small model in the box: a whole "
        "job without a cache records this one"
    )
    cache, _ = prepared_cache(monkeypatch, tmp_path, "budget", range(10), 20, asked=20)
    assert cache.left(3) == (2, 7)  # up to its own last step, not the job's
    _, (told,) = prepared_cache(monkeypatch, tmp_path, "budget", range(6, 12), 12, asked=12)
    assert "gains nothing in steps 7 to 12 of 12: all of them are computed, as fewer than" in told


def test_the_plan_counts_forwards_and_state(t2v_folder: Path) -> None:
    plans = {}
    for word in ("off", "plan:5", "budget"):
        with Engine.open(
            t2v_folder, device="cpu", vram="200MiB", ram="200MiB", step_cache=word
        ) as it:
            plans[word] = it.plan(REQUEST)
    assert [plans[word]["denoise"].forwards for word in plans] == [(10, 10), (5, 5), (4, 10)]
    off, five = plans["off"]["denoise"], plans["plan:5"]["denoise"]
    assert five.seconds < 0.6 * off.seconds
    more = dict(five.work)["latents"] - dict(off.work)["latents"]
    assert more == 2 * dict(off.ram_work)["latents"]


def peak_of(engine: Engine, request: GenerationRequest, plan: Plan) -> int:
    """Bytes of live tensors in the denoising alone, which leaves no record."""
    stage = Stage(
        replace(engine.run_of(request, plan), sources={}), lambda event: None, threading.Event()
    )
    work = work_of(stage)
    found = work.drawn(stage)
    with _meter(engine) as meter, _host_buffers_apart(meter), torch.no_grad():
        work.phases["denoise"](stage, found)
    return meter.peak


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_what_a_cache_keeps_is_planned(t2v_folder: Path, guidance: float) -> None:
    request = replace(REQUEST, width=256, height=256, guidance_scale=guidance)
    with an_engine(t2v_folder) as engine:
        off = engine.plan(request)
        chunk = off["denoise"].chunk_tokens
        with an_engine(t2v_folder, step_cache="plan:5", chunk_tokens=chunk) as other:
            cached = other.plan(request)
        more = peak_of(engine, request, cached) - peak_of(engine, request, off)
    promised = cached["denoise"].work_bytes - off["denoise"].work_bytes
    latents = dict(off["denoise"].ram_work)["latents"]
    assert 2 * latents <= more <= promised <= 3 * latents


@pytest.mark.parametrize(
    "word", ["", "on", "plan", "plan:1", "plan:x", "budget:0", "budget:-1", "budget:nan", 3]
)
def test_what_is_no_cache_is_refused(word: object) -> None:
    with pytest.raises(ProfileError, match="cache"):
        Caching.of(word)


@pytest.mark.parametrize(("shift", "first", "forwards"), [(12.0, 12, 10), (5.0, 8, 9)])
def test_no_other_share_of_forwards_is_better(shift: float, first: int, forwards: int) -> None:
    noise = noise_levels("unipc", 20, shift)
    after = (*noise[1:], 0.0)
    left = left_of_errors(noise, [a - b for a, b in zip(noise, after, strict=True)])
    built_in = Recorded.built_in()

    def lost(own: slice, each: int) -> float:
        run, weights = built_in.at(noise[own]), left[own]
        return cost(run, list(weights), best_schedule(run, weights, each))

    tried = {
        each: lost(slice(first), each) + lost(slice(first, 20), forwards - each)
        for each in range(2, forwards - 1)
        if each <= first and forwards - each <= 20 - first
    }
    best = min(tried, key=tried.__getitem__)
    parts = (range(first), range(first, 20))
    assert best < round(forwards * first / 20)  # fewer than its steps alone would have
    assert shared_forwards(noise, parts, forwards) == (best, forwards - best)
    whole = best_schedule(built_in.at(noise), left, forwards, starts=(first,))
    one = best_schedule(built_in.at(noise[:first]), left[:first], best)
    other = best_schedule(built_in.at(noise[first:]), left[first:], forwards - best)
    assert whole.computed == one.computed + tuple(first + step for step in other.computed)
    assert whole.damping == pytest.approx(one.damping + other.damping)


@pytest.mark.parametrize(
    ("forwards", "ends", "expected"),
    [
        (10, (6, 20), (6, 4)), (5, (6, 20), (6, 2)), (9, (20, 20), (9, 0)), (9, (0, 20), (0, 9)),
        (3, (10, 20), (2, 2)), (30, (10, 20), (10, 10)), (11, (13, 14, 15, 20), (4, 1, 1, 5)),
        (12, (30, 35, 40), (2, 5, 5)), (3, (12, 20), (2, 2)),
    ],
)  # fmt: skip
def test_no_part_has_fewer_forwards_than_it_must(
    forwards: int, ends: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    parts = tuple(range(*pair) for pair in zip((0, *ends), ends, strict=False))
    noise = noise_levels("unipc", ends[-1], 5.0)
    assert shared_forwards(noise, parts, forwards) == expected


def test_the_next_transformer_begins_from_nothing() -> None:
    first = StepCache(range(8), Budget(1.0, levels(16), [0.1] * 16, 7))
    for step in range(2):
        first.computed(step, torch.ones(2), torch.ones(2))
    assert first.left(2) == (1, 6)  # there is a line: only its last step is sure
    state = first.state()
    state = SamplerState(state.values | {"next_step": 8}, state.tensors)
    second = StepCache(range(8, 16), Budget(1.0, levels(16), [0.1] * 16, 15))
    second.load_state(state)
    assert second.computed_steps == [0, 1]
    assert second.wants(8)
    assert second.left(8) == (2, 8)


@pytest.mark.parametrize("word", ["plan:5", "budget:0.05"])
def test_a_video_in_windows_skips_all_of_a_steps_windows(
    t2v_folder: Path, word: str, tmp_path: Path
) -> None:
    request = replace(REQUEST, frames=17, window=9, overlap=4)
    with an_engine(t2v_folder, step_cache=word) as engine:
        plan = engine.plan(request)
        assert plan["denoise"].windows > 1
        whole = engine.submit(request).result()
        computed = whole.report.computed_steps
        assert len(computed) < STEPS
        skipped = next(s for s in range(1, STEPS) if s not in computed)
        denoise = next(phase for phase in whole.report.phases if phase.name == "denoise")
        assert denoise.predicted_vram_bytes >= denoise.measured_vram_bytes
        moving = [step.flow.device_to_compute.nbytes > 0 for step in denoise.steps]
        assert [step for step, moved in enumerate(moving) if moved] == list(computed)
        for cut in (skipped, skipped + 1):
            stop_at(cut, engine, request, tmp_path / str(cut))
            again = engine.resume(tmp_path / str(cut)).result()
            assert torch.equal(again.latents, whole.latents)
