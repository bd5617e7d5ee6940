"""A job that ends early is continued: identical to the bit, with at most one step done twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan import defaults
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Event, Notice, PhaseStarted, Progress
from penstock.engine.run.jobs import describe
from penstock.engine.run.report import JobResult
from penstock.engine.store.journal import (
    CONDITIONING_FILE,
    JOB_FILES,
    LATENTS_FILE,
    PICTURE_FILE,
    STATE_FILES,
    read_record,
)
from penstock.errors import (
    FingerprintMismatch,
    JobCancelled,
    JobLocked,
    JournalError,
    OutputError,
)
from tests.engine.run.lazy_disk import make_lazy
from tests.faults.film import frames_sha

STEPS = 4


def a_request(picture: Path | None, **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": "a cat", "negative_prompt": "", "width": 48, "height": 32, "frames": 5,
        "image": picture, "steps": STEPS, "seed": 3,
    }  # fmt: skip
    return GenerationRequest(**(values | changes))


def an_engine(folder: Path, **budgets: Any) -> Engine:
    return Engine.open(folder, device="cpu", **({"vram": "200MiB", "ram": "200MiB"} | budgets))


def run_until(job: Any, stop: Callable[[Event], bool]) -> list[Event]:
    """Cancel ``job`` at the first event for which ``stop`` holds; returns all events."""
    seen = []
    for event in job.events():
        seen.append(event)
        if stop(event):
            job.cancel()
    return seen


def steps_done(events: list[Event]) -> list[int]:
    return [e.step for e in events if isinstance(e, Progress) and e.phase == "denoise"]


def phases_begun(events: list[Event]) -> list[str]:
    return [event.phase for event in events if isinstance(event, PhaseStarted)]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run that keeps nothing."""

    folder: Path
    picture: Path | None
    result: JobResult
    sha: str


@pytest.fixture(scope="module")
def whole(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole(t2v_folder, None, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_i2v(i2v_folder: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole(i2v_folder, picture, tmp_path_factory.mktemp("whole"))


def _whole(folder: Path, picture: Path | None, scratch: Path) -> Whole:
    with an_engine(folder) as engine:
        result = engine.submit(a_request(picture), scratch / "whole.mp4").result()
    return Whole(folder, picture, result, frames_sha(scratch / "whole.mp4"))


def stopped_job(whole: Whole, tmp_path: Path, stop: Callable[[Event], bool]) -> list[Event]:
    """Run the job of ``whole`` in tmp_path/job until ``stop``; returns its events."""
    with an_engine(whole.folder) as engine:
        job = engine.submit(
            a_request(whole.picture), tmp_path / "out.mp4", job_dir=tmp_path / "job"
        )
        events = run_until(job, stop)
        with pytest.raises(JobCancelled, match=f"penstock resume {tmp_path / 'job'}"):
            job.result()
    assert read_record(tmp_path / "job").state == "stopped"
    assert not (tmp_path / "out.mp4").exists()
    return events


def resumed(whole: Whole, tmp_path: Path, **how: Any) -> tuple[list[Event], JobResult]:
    with an_engine(whole.folder) as engine:
        job = engine.resume(tmp_path / "job", **how)
        return list(job.events()), job.result()


def assert_same(whole: Whole, result: JobResult, output: Path) -> None:
    assert torch.equal(result.latents, whole.result.latents)
    assert torch.equal(result.video, whole.result.video)
    assert frames_sha(output) == whole.sha


def at_step(number: int) -> Callable[[Event], bool]:
    return lambda e: isinstance(e, Progress) and e.phase == "denoise" and e.step >= number


def in_phase(name: str, done: int = 0) -> Callable[[Event], bool]:
    return lambda e: (
        isinstance(e, PhaseStarted | Progress)
        and e.phase == name
        and (getattr(e, "step", 0) >= done)
    )


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_job_stopped_after_a_step_goes_on_from_it(
    whole: Whole, tmp_path: Path, step: int
) -> None:
    before = steps_done(stopped_job(whole, tmp_path, at_step(step)))
    events, result = resumed(whole, tmp_path)
    assert_same(whole, result, tmp_path / "out.mp4")
    done = steps_done(events)
    assert done == list(range(done[0], STEPS + 1))
    assert done[0] == before[-1] + 1  # no finished step is done twice
    assert "text" not in phases_begun(events)
    assert read_record(tmp_path / "job").state == "done"
    left = {path.name for path in (tmp_path / "job").iterdir()}
    assert left == {*JOB_FILES, LATENTS_FILE, "lock"}


@pytest.mark.parametrize("phase", ["text", "encode", "context", "denoise", "decode"])
def test_a_job_stopped_in_any_phase_goes_on(whole_i2v: Whole, tmp_path: Path, phase: str) -> None:
    stopped_job(whole_i2v, tmp_path, in_phase(phase))
    events, result = resumed(whole_i2v, tmp_path)
    assert_same(whole_i2v, result, tmp_path / "out.mp4")
    assert ("denoise" in phases_begun(events)) == (phase != "decode")


def test_decoded_tiles_are_not_decoded_again(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent_frames, frames, tiles = 2, 5, 4
    with an_engine(whole.folder) as engine:
        plan = engine.plan(a_request(None))
        tiled = plan.with_phases((replace(plan["decode"], tiles=(2, 2)),))
        monkeypatch.setattr(engine, "plan", lambda request, **_: tiled)
        job = engine.submit(a_request(None), tmp_path / "out.mp4", job_dir=tmp_path / "job")
        run_until(job, in_phase("decode", done=latent_frames + 2 * frames + 1))
        assert len(list((tmp_path / "job").glob("tile-2x2-*.safetensors"))) == 2
        job = engine.resume(tmp_path / "job")
        decoded = [e.step for e in job.events() if isinstance(e, Progress) and e.phase == "decode"]
        uninterrupted = engine.submit(a_request(None)).result()
    assert len(decoded) == latent_frames + frames * (tiles - 2)
    assert torch.equal(job.result().video, uninterrupted.video)


@pytest.mark.parametrize("name", [CONDITIONING_FILE, *STATE_FILES])
def test_a_damaged_part_is_done_again_and_told(whole: Whole, tmp_path: Path, name: str) -> None:
    stopped_job(whole, tmp_path, at_step(2))
    path = tmp_path / "job" / name
    path.write_bytes(path.read_bytes()[:-3])
    events, result = resumed(whole, tmp_path)
    assert_same(whole, result, tmp_path / "out.mp4")
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any(name in message for message in notices)
    assert any(name in message for message in result.report.notices)


def test_two_damaged_states_end_the_job_with_a_named_error(whole: Whole, tmp_path: Path) -> None:
    stopped_job(whole, tmp_path, at_step(2))
    for name in STATE_FILES:
        (tmp_path / "job" / name).write_bytes(b"junk")
    with an_engine(whole.folder) as engine, pytest.raises(JournalError) as caught:
        engine.resume(tmp_path / "job").result()
    assert STATE_FILES[0] in str(caught.value) and STATE_FILES[1] in str(caught.value)


def test_the_picture_is_kept_with_the_job(whole_i2v: Whole, tmp_path: Path) -> None:
    picture = tmp_path / "own.png"
    assert whole_i2v.picture is not None
    picture.write_bytes(whole_i2v.picture.read_bytes())
    with an_engine(whole_i2v.folder) as engine:
        job = engine.submit(a_request(picture), tmp_path / "out.mp4", job_dir=tmp_path / "job")
        picture.unlink()
        run_until(job, in_phase("text"))
        _, result = resumed(whole_i2v, tmp_path)
    assert_same(whole_i2v, result, tmp_path / "out.mp4")


def test_a_damaged_picture_is_refused(whole_i2v: Whole, tmp_path: Path) -> None:
    stopped_job(whole_i2v, tmp_path, in_phase("text"))
    path = tmp_path / "job" / PICTURE_FILE
    path.write_bytes(path.read_bytes() + b"x")
    with an_engine(whole_i2v.folder) as engine, pytest.raises(JournalError, match="is damaged"):
        engine.resume(tmp_path / "job")


def test_other_conditions_are_named_and_refused_unless_allowed(
    whole: Whole, tmp_path: Path
) -> None:
    stopped_job(whole, tmp_path, at_step(1))
    torch.set_num_threads(2)
    try:
        with an_engine(whole.folder) as engine:
            with pytest.raises(FingerprintMismatch, match=r"numerics\.threads 1.*threads 2"):
                engine.resume(tmp_path / "job")
            job = engine.resume(tmp_path / "job", allow_nonidentical=True)
            result = job.result()
    finally:
        torch.set_num_threads(1)
    assert any("numerics.threads was 1 and is 2" in n for n in result.report.notices)


def test_a_job_of_other_noise_levels_is_named_and_refused(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr("penstock.engine.run.stored.RULE", "diffusers")
        stopped_job(whole, tmp_path, at_step(1))
    told = r"numerics\.noise_levels 'diffusers'.*noise_levels 'makers 1'"
    with an_engine(whole.folder) as engine, pytest.raises(FingerprintMismatch, match=told):
        engine.resume(tmp_path / "job")


@pytest.mark.parametrize("stop_at", ["before the first step", "after one"])
def test_a_job_keeps_the_shift_it_began_with(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    began = defaults.flow_shift
    stop = at_step(1) if stop_at == "after one" else in_phase("denoise")
    stopped_job(whole, tmp_path, stop)
    monkeypatch.setattr(
        defaults, "flow_shift", lambda w, h, asked, **of: began(w, h, asked or 12.0, **of)
    )
    _, result = resumed(whole, tmp_path)
    assert_same(whole, result, tmp_path / "out.mp4")


def test_a_changed_model_is_named_and_refused(whole: Whole, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(whole.folder, folder)
    own = Whole(folder, None, whole.result, whole.sha)
    stopped_job(own, tmp_path, at_step(1))
    weights = next((folder / "transformer").glob("*.safetensors"))
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with an_engine(folder) as engine, pytest.raises(FingerprintMismatch) as caught:
        engine.resume(tmp_path / "job")
    fields = {field for field, _, _ in caught.value.differences}
    assert fields == {f"files.transformer/{weights.name}.sha256"}


def test_a_running_job_is_locked_and_a_done_one_is_done(whole: Whole, tmp_path: Path) -> None:
    with an_engine(whole.folder) as engine:
        job = engine.submit(a_request(None), tmp_path / "out.mp4", job_dir=tmp_path / "job")
        with pytest.raises(JobLocked):
            engine.resume(tmp_path / "job")
        job.result()
        with pytest.raises(JournalError, match="is done"):
            engine.resume(tmp_path / "job")
        with pytest.raises(JournalError, match="holds a job already"):
            engine.submit(a_request(None), tmp_path / "b.mp4", job_dir=tmp_path / "job")


def test_an_output_that_someone_else_made_is_not_replaced(whole: Whole, tmp_path: Path) -> None:
    stopped_job(whole, tmp_path, at_step(3))
    (tmp_path / "out.mp4").write_text("mine")
    with an_engine(whole.folder) as engine:
        with pytest.raises(OutputError, match="exists"):
            engine.resume(tmp_path / "job")
        result = engine.resume(tmp_path / "job", tmp_path / "other.mp4").result()
    assert_same(whole, result, tmp_path / "other.mp4")
    assert (tmp_path / "out.mp4").read_text() == "mine"


@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler"])
def test_every_sampler_continues_identically(
    t2v_folder: Path, tmp_path: Path, sampler: str
) -> None:
    request = a_request(None, sampler=sampler, steps=5)
    with an_engine(t2v_folder) as engine:
        latents = engine.submit(request).result().latents
        job = engine.submit(request, job_dir=tmp_path / "job")
        run_until(job, at_step(3))
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, latents)


def test_when_a_step_is_made_the_one_before_it_is_on_the_disk(
    t2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the disk is: who ends the process here loses this one step alone."""
    make_lazy(monkeypatch)
    on_disk: list[int] = []

    def look(step: int, latents: torch.Tensor) -> None:
        on_disk.append(describe(tmp_path / "job").step)

    with an_engine(t2v_folder) as engine:
        engine.submit(a_request(None), job_dir=tmp_path / "job", on_step=look).result()
    assert on_disk == [0, 1, 2, 3]
