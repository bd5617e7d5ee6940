"""A job as the tool that embeds it sees it: events for any consumer, cancel, turns, threads."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Event, Notice, PhaseEnded, PhaseStarted, Progress
from penstock.engine.run.job import Job
from penstock.engine.run.jobs import describe
from penstock.errors import DeviceLost, JobCancelled, UsageError
from penstock.profiles.plan import Plan
from tests.engine.running import Gate, a_request, an_engine


@pytest.fixture(scope="module")
def engine(t2v_folder: Path) -> Iterator[Engine]:
    with an_engine(t2v_folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def done(engine: Engine) -> Job:
    """A job that has ended."""
    job = engine.submit(a_request())
    job.result()
    return job


async def _collected(job: Job) -> list[Event]:
    return [event async for event in job.events()]


def test_every_consumer_sees_every_event(engine: Engine) -> None:
    gate = Gate()
    job = engine.submit(a_request(), on_step=gate)
    with ThreadPoolExecutor(3) as threads:
        early = [threads.submit(list, job.events()) for _ in range(2)]
        asynchronous = threads.submit(asyncio.run, _collected(job))
        assert gate.reached.wait()
        gate.open()
        seen = [future.result() for future in (*early, asynchronous)]
    late = list(job.events())
    assert seen == [late, late, late]
    assert asyncio.run(_collected(job)) == late
    assert {type(event) for event in late} == {PhaseStarted, Progress, PhaseEnded}
    assert [event.phase for event in late if isinstance(event, PhaseEnded)] == [
        "text", "context", "denoise", "decode",
    ]  # fmt: skip


def test_progress_says_how_far_and_how_long(done: Job) -> None:
    steps = [e for e in done.events() if isinstance(e, Progress) and e.phase == "denoise"]
    assert [(e.step, e.total, e.unit) for e in steps] == [
        (1, 3, "step"), (2, 3, "step"), (3, 3, "step"),
    ]  # fmt: skip
    assert [e.eta_s == 0 for e in steps] == [False, False, True]
    plan = done.plan["denoise"]
    for event in steps:
        assert 0 < event.vram_bytes <= plan.vram_bytes
        assert 0 <= event.ram_bytes <= plan.ram_bytes
        assert event.stall_s >= 0
        assert event.preview is None


def test_events_come_while_the_job_runs_and_do_not_block_the_loop(engine: Engine) -> None:
    gate = Gate()
    job = engine.submit(a_request(), on_step=gate)

    async def watch() -> tuple[list[str], bool]:
        beats, running = 0, True

        async def beat() -> None:
            nonlocal beats
            while running:
                beats += 1
                await asyncio.sleep(0)

        heart = asyncio.ensure_future(beat())
        phases = []
        async for event in job.events():
            if isinstance(event, PhaseStarted):
                phases.append(event.phase)
            if isinstance(event, PhaseStarted) and event.phase == "denoise":
                before = beats
                while not gate.reached.is_set() or beats < before + 10:
                    await asyncio.sleep(0.001)
                was_done = job.done
                gate.open()
        running = False
        await heart
        return phases, was_done

    phases, was_done = asyncio.run(watch())
    assert phases == ["text", "context", "denoise", "decode"]
    assert not was_done


def test_a_loop_that_is_left_or_closed_does_not_disturb_the_job(engine: Engine) -> None:
    gate = Gate()
    job = engine.submit(a_request(), on_step=gate)
    loop = asyncio.new_event_loop()
    stream = aiter(job.events())
    loop.run_until_complete(anext(stream))
    loop.close()  # with the iteration open: the job's next event finds a loop that is closed
    for _ in job.events():
        break
    gate.open()
    assert job.result().video.shape == (5, 32, 48, 3)


def test_cancel_is_answered_before_anything_else_happens(engine: Engine) -> None:
    gate = Gate()
    job = engine.submit(a_request(), on_step=gate)
    assert gate.reached.wait()
    job.cancel()
    job.cancel()
    gate.open()
    with pytest.raises(JobCancelled):
        job.result()
    events = list(job.events())
    (answer,) = (at for at, event in enumerate(events) if isinstance(event, Notice))
    assert events[answer] == Notice("stopping at the next block or tile")
    # The step that was under way is finished, and nothing is begun.
    assert [type(event) for event in events[answer + 1 :]] == [Progress]


def test_cancelling_a_job_that_is_done_changes_nothing(done: Job) -> None:
    events = list(done.events())
    done.cancel()
    assert list(done.events()) == events
    assert done.result().video.shape == (5, 32, 48, 3)


def test_result_gives_up_after_its_time(engine: Engine) -> None:
    gate = Gate()
    job = engine.submit(a_request(), on_step=gate)
    assert gate.reached.wait()
    with pytest.raises(TimeoutError, match="still running"):
        job.result(0.01)
    assert not job.wait(0.01)
    gate.open()
    assert job.wait()


def test_a_job_that_waits_for_its_turn_can_be_cancelled(engine: Engine, tmp_path: Path) -> None:
    gate = Gate()
    first = engine.submit(a_request(), on_step=gate)
    second = engine.submit(a_request(), tmp_path / "a.mp4", job_dir=tmp_path / "job")
    assert gate.reached.wait()
    second.cancel()
    with pytest.raises(JobCancelled, match="before its turn came.*penstock resume"):
        second.result()
    assert not first.done
    assert describe(tmp_path / "job").state == "stopped"
    gate.open()
    first.result()
    resumed = engine.resume(tmp_path / "job").result()
    assert torch.equal(resumed.video, first.result().video)


def test_jobs_submitted_from_many_threads_are_all_done_alike(engine: Engine, done: Job) -> None:
    barrier = threading.Barrier(6)

    def submit(_: int) -> Job:
        barrier.wait()
        return engine.submit(a_request())

    with ThreadPoolExecutor(6) as threads:
        jobs = list(threads.map(submit, range(6)))
    for job in jobs:
        assert torch.equal(job.result().video, done.result().video)


def test_close_ends_every_job_of_every_thread(t2v_folder: Path) -> None:
    engine, gate = an_engine(t2v_folder), Gate()
    threads_before = threading.active_count()
    first = engine.submit(a_request(), on_step=gate)
    assert gate.reached.wait()
    with ThreadPoolExecutor(4) as threads:
        jobs = list(threads.map(lambda _: engine.submit(a_request()), range(4)))
        gate.open()
        engine.close()
    engine.close()
    for job in (first, *jobs):
        assert job.done
        with pytest.raises(JobCancelled):
            job.result()
    assert threading.active_count() == threads_before


@pytest.mark.parametrize("call", ["submit", "resume"])
def test_a_closed_engine_says_so(t2v_folder: Path, tmp_path: Path, call: str) -> None:
    engine = an_engine(t2v_folder)
    engine.close()
    start: dict[str, Callable[[], Job]] = {
        "submit": lambda: engine.submit(a_request(), job_dir=tmp_path / "job"),
        "resume": lambda: engine.resume(tmp_path / "job"),
    }
    with pytest.raises(UsageError, match="the engine is closed. Open another one"):
        start[call]()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_closes_between_check_and_start_leaves_no_lock(
    t2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = an_engine(t2v_folder)
    plan = engine.plan

    def plan_and_close(request: GenerationRequest, *, saved: bool) -> Plan:
        engine.close()
        return plan(request, saved=saved)

    monkeypatch.setattr(engine, "plan", plan_and_close)
    with pytest.raises(UsageError, match="closed"):
        engine.submit(a_request(), job_dir=tmp_path / "job")
    with an_engine(t2v_folder) as another:  # nobody holds the job's lock
        assert another.resume(tmp_path / "job").result().video.shape == (5, 32, 48, 3)


def test_a_lost_device_refuses_further_jobs(
    t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.engine.engine as module

    with an_engine(t2v_folder) as engine:
        monkeypatch.setattr(module, "run", _lose_the_device)
        monkeypatch.setattr(module, "release_cached", _lose_the_device)
        job = engine.submit(a_request())
        with pytest.raises(DeviceLost):
            job.result()
        with pytest.raises(DeviceLost):
            engine.submit(a_request())


def _lose_the_device(*arguments: object) -> None:
    raise DeviceLost("the device has failed")


def test_requests_and_events_can_be_pickled(done: Job) -> None:
    request = a_request(image=Path("cat.png"), shift=3.5)
    assert pickle.loads(pickle.dumps(request)) == request  # noqa: S301 - our own bytes
    events = list(done.events())
    assert pickle.loads(pickle.dumps(events)) == events  # noqa: S301 - our own bytes


def _while_engines_open(folder: Path, work: Callable[[], None]) -> None:
    """Do ``work`` again and again on another thread while four threads open models."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            work()

    def opened(_: int) -> bool:
        with an_engine(folder) as engine:
            return bool(engine.model.transformer.module.proj_out.weight.is_meta)

    with ThreadPoolExecutor(5) as threads:
        other = threads.submit(repeat)
        try:
            assert all(threads.map(opened, range(8)))
        finally:
            stop.set()
        other.result()


def test_opening_does_not_reach_into_what_other_threads_build(t2v_folder: Path) -> None:
    register = torch.nn.Module.register_parameter
    devices = set()
    _while_engines_open(t2v_folder, lambda: devices.add(torch.nn.Linear(2, 2).weight.device.type))
    assert devices == {"cpu"}
    assert torch.nn.Module.register_parameter is register


def test_opening_does_not_touch_the_random_numbers_of_other_threads(t2v_folder: Path) -> None:
    torch.manual_seed(7)
    drawn: list[float] = []
    _while_engines_open(t2v_folder, lambda: drawn.append(float(torch.rand(1))))
    torch.manual_seed(7)
    assert drawn == [float(torch.rand(1)) for _ in drawn]
