"""The full counts of the fault tests (``make faults``); the quick part is in tests/engine.

Each test prints its figures in one line that begins with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.packs.plan import plan_component
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.levels import noise_levels
from penstock.folders import cache_folder
from tests.engine import golden
from tests.engine.conftest import SMALL_VAE
from tests.engine.run.test_killed import finish, kill_at_failpoints, kill_at_moments
from tests.engine.run.test_resume import a_request, an_engine
from tests.faults.changes import change_bytes
from tests.faults.child import Task
from tests.faults.film import frames_sha
from tests.faults.races import one_cache, one_folder, one_name, removed_and_begun

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").resize((96, 80)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny_model(tmp_path_factory.mktemp("i2v"), seed=1, vae=SMALL_VAE)
    with an_engine(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def sha(engine: Engine, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    engine.submit(a_request(picture), output).result()
    return frames_sha(output)


def test_sigkill_at_failpoints(engine: Engine, picture: Path, sha: str, tmp_path: Path) -> None:
    total, redone = kill_at_failpoints(engine, picture, sha, tmp_path)
    print(f"\nsigkill at all {total} failpoints: resumed and identical, {redone} steps redone")
    assert total >= 80


def test_sigkill_across_the_swap_of_two_transformers(picture: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a14b", experts=True, seed=1, vae=SMALL_VAE)
    with an_engine(folder) as engine:
        output = tmp_path / "out.mp4"
        engine.submit(a_request(picture), output).result()
        total, redone = kill_at_failpoints(engine, picture, frames_sha(output), tmp_path, count=40)
    print(f"\nsigkill at 40 of {total} failpoints of two transformers: {redone} steps redone")
    assert total >= 80


@pytest.mark.parametrize("cache", ["plan:4", "budget:0.05"])
def test_sigkill_of_a_job_that_skips_steps(
    cache: str, engine: Engine, picture: Path, tmp_path: Path
) -> None:
    redone, steps, request = 0, 8, a_request(picture, steps=8)
    with an_engine(Path(str(engine.model.opening.model)), step_cache=cache) as skipping:
        report = skipping.submit(request, tmp_path / "whole.mp4").result().report
        assert len(report.computed_steps) < steps
        for last in range(1, steps):
            (tmp_path / f"{last}").mkdir()
            task = Task(skipping, request, tmp_path / f"{last}")
            killed = task.attempt(kill_at_step=last)
            assert killed.was_killed
            redone += finish(task, [killed], frames_sha(tmp_path / "whole.mp4"))
    print(f"\nsigkill under {cache} after each of {steps - 1} steps, identical, {redone} redone")


def test_sigkill_of_two_transformers_that_skip_steps(picture: Path, tmp_path: Path) -> None:
    """Killed after each step; a whole job leaves records of both before any of them goes on."""
    folder = write_tiny_model(tmp_path / "a14b", experts=True, seed=1, vae=SMALL_VAE)
    steps, whole, redone = 20, tmp_path / "whole.mp4", 0
    request, kept = a_request(picture, steps=steps), []
    with an_engine(folder, step_cache="plan:9") as skipping:
        report = skipping.submit(request, whole).result().report
        assert len(report.computed_steps) == 9
        for last in range(1, steps):
            (tmp_path / f"{last}").mkdir()
            task = Task(skipping, request, tmp_path / f"{last}")
            kept.append((task, task.attempt(kill_at_step=last)))
            assert kept[-1][1].was_killed
        with an_engine(folder) as computing:
            computing.submit(request).result()
        assert len(list(cache_folder().glob("steps/*.json"))) == 2
        for task, killed in kept:
            redone += finish(task, [killed], frames_sha(whole))
        other = skipping.submit(request, tmp_path / "other.mp4").result().report
    assert other.computed_steps != report.computed_steps  # a new job does take the records
    print(f"\nsigkill of two under a plan after each of {steps - 1} steps, {redone} redone")


def interval(request: GenerationRequest) -> GenerationRequest:
    levels = noise_levels("unipc", request.steps, 3.0)
    assert len({0.5 <= level <= 0.93 for level in levels}) == 2  # two kinds of steps
    return replace(request, shift=3.0, guidance_scale=4.0, cfg_interval="0.5,0.93")


def contrasted(request: GenerationRequest) -> GenerationRequest:
    return replace(request, guidance_scale=1.0, nag_scale=11.0, negative_prompt="blurry")


@pytest.mark.parametrize("guided", [interval, contrasted], ids=["an interval", "NAG"])
def test_sigkill_of_a_job_with_cheaper_guidance(
    guided: Callable[[GenerationRequest], GenerationRequest],
    engine: Engine,
    picture: Path,
    tmp_path: Path,
) -> None:
    redone, steps = 0, 5
    request = guided(a_request(picture, steps=steps))
    engine.submit(request, tmp_path / "whole.mp4").result()
    for last in range(1, steps):
        (tmp_path / f"{last}").mkdir()
        task = Task(engine, request, tmp_path / f"{last}")
        killed = task.attempt(kill_at_step=last)
        assert killed.was_killed
        redone += finish(task, [killed], frames_sha(tmp_path / "whole.mp4"))
    print(
        f"\nsigkill, guidance {guided.__name__}, after each of {steps - 1} steps: {redone} redone"
    )


def test_sigkill_at_random_moments(engine: Engine, picture: Path, sha: str, tmp_path: Path) -> None:
    hit = redone = jobs = 0
    while hit < 200:
        (tmp_path / f"{jobs}").mkdir()
        found = kill_at_moments(
            engine, picture, sha, tmp_path / f"{jobs}", jobs=10, kills=4, seed=jobs
        )
        hit, redone, jobs = hit + found[0], redone + found[1], jobs + 10
    print(
        f"\nsigkill at random moments: {hit} kills in {jobs} jobs, all identical, {redone} redone"
    )


def test_changed_bytes_of_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "num_layers": 3}
    model = write_tiny_model(
        tmp_path / "model", image_to_video=False, vae=SMALL_VAE, transformer=large
    )
    size = sum(path.stat().st_size for path in (model / "transformer").glob("*.safetensors"))
    assert size >= 200_000_000
    found = change_bytes(model, tmp_path, monkeypatch, count=1000, seed=2)
    print(f"\nsingle bytes changed in {size:,} bytes of weights: {found}")
    assert found.packs == found.resumes == found.changes == found.believed == 1000


def test_races(tmp_path: Path) -> None:
    plan = plan_component(
        locate(golden.write_model(tmp_path / "model", image_to_video=False)).streamed, "int8"
    )
    found = {
        "one output": one_name(tmp_path / "name", races=1000),
        "one job": one_folder(tmp_path / "job", races=1000),
        "a job removed and begun": removed_and_begun(tmp_path / "removed", races=1000),
        "one cache": one_cache(plan, tmp_path / "cache", races=1000),
    }
    print(f"\nraces of processes, and what was lost: {found}")
    assert all(lost == 0 for _, lost in found.values())
