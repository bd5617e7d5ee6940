"""Cancelled at any moment a job stops within a block or a VAE tile, and nothing of it is left."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import penstock.engine.engine as engine_module
from penstock.engine.model.component import Component
from penstock.engine.run.events import Event, Listener, Notice, PhaseStarted, Progress
from penstock.engine.run.job import Job
from penstock.engine.run.pipeline import run
from penstock.engine.run.report import JobResult
from penstock.engine.run.stage import Run, Stage
from penstock.errors import JobCancelled
from penstock.offload.mover import Carrier
from penstock.profiles.plan import StreamPlan
from tests.engine.running import a_request, an_engine
from tests.meter import StorageMeter


class Watch:
    """What happens in a job, in order, and what is left of its memory."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.meter = StorageMeter()
        self.ledger_bytes = -1
        self.wait_for(0)

    def wait_for(self, count: int, *, holds: bool = False) -> None:
        """Forget what has happened; `reached` is set when ``count`` things have, and the job then
        waits for `goes_on` if it ``holds``."""
        self.happened.clear()
        self._count, self._holds = count, holds
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def note(self, what: str) -> None:
        """Something happens."""
        self.happened.append(what)
        if len(self.happened) == self._count:
            self.reached.set()
            if self._holds:
                self.goes_on.wait()

    def after_cancel(self) -> list[str]:
        """Everything from the moment at which `Job.cancel` had returned."""
        return self.happened[self.happened.index("cancelled") + 1 :]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Networks and blocks as they are begun, units of work as they are finished."""
    seen = Watch()
    bound, initialise = Component.bound, Stage.__init__
    stages: list[Stage] = []

    @contextmanager
    def seen_bound(self: Component, tensors: Any, index: int | None = None) -> Iterator[Any]:
        seen.note("begun")
        with bound(self, tensors, index) as module:
            yield module

    def seen_stage(self: Stage, *arguments: Any) -> None:
        initialise(self, *arguments)
        stages.append(self)

    def watched_run(work: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
        def tell(event: Event) -> None:
            if isinstance(event, Progress):
                seen.note("finished")
            listener(event)

        modules = (component.module for component in work.model.components())
        seen.meter = StorageMeter(b for m in modules for b in m.buffers() if not b.is_meta)
        try:
            with seen.meter:
                return run(work, tell, cancelled)
        finally:
            stage = stages.pop()
            seen.ledger_bytes = stage.device_ledger.used + stage.host_ledger.used

    monkeypatch.setattr(Component, "bound", seen_bound)
    monkeypatch.setattr(Stage, "__init__", seen_stage)
    monkeypatch.setattr(engine_module, "run", watched_run)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("moments", [30, pytest.param(100, marks=pytest.mark.faults)])
def test_random_moments(
    moments: int, i2v_folder: Path, picture: Path, tmp_path: Path, watch: Watch
) -> None:
    request = a_request(image=picture, steps=2, width=32, height=32, guidance_scale=1.0)
    rng, process = random.Random(8), psutil.Process()
    hit: list[str] = []
    with an_engine(i2v_folder) as engine:
        engine.submit(request).result()  # loads libraries
        total = len(watch.happened)
        files, threads = process.num_fds(), threading.active_count()
        while len(hit) < moments:
            # Every second job waits for its cancel, at moments all over its life; the others go on.
            held, at = len(hit) % 2 == 0, len(hit) * total // moments
            watch.wait_for(1 + (at if held else rng.randrange(total)), holds=held)
            job = engine.submit(request, tmp_path / "out.mp4")
            watch.reached.wait()
            job.cancel()
            watch.happened.append("cancelled")
            watch.goes_on.set()
            if _finished(job, tmp_path / "out.mp4"):
                continue  # its cancel came too late: it says nothing
            hit.append(_phase_of(list(job.events())))
            after = watch.after_cancel()
            # A check that was passed just before may let one thing begin; nothing comes after it.
            assert after.count("begun") <= 1
            assert after.count("finished") <= 1
            assert watch.ledger_bytes == 0
            assert watch.meter.live == 0
            assert list(tmp_path.iterdir()) == []
            assert (process.num_fds(), threading.active_count()) == (files, threads)
    assert len(hit) == moments
    assert {"text", "encode", "denoise", "decode"} <= set(hit)


def _finished(job: Job, output: Path) -> bool:
    try:
        job.result()
    except JobCancelled:
        return False
    output.unlink()
    return True


def _phase_of(events: list[Event]) -> str:
    """The phase in which the job was when it was cancelled."""
    answer = next(at for at, event in enumerate(events) if isinstance(event, Notice))
    begun = [event.phase for event in events[:answer] if isinstance(event, PhaseStarted)]
    return begun[-1] if begun else "before the first"


def test_while_resident_blocks_are_loaded(
    t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That can take a minute for a real model: no block is loaded after the one under way."""
    load, begun, loads = Carrier.load, threading.Event(), []

    def stopping(*arguments: Any) -> None:
        if begun.is_set():
            loads.append(arguments)
        if len(loads) == 2:
            job.cancel()
        load(*arguments)

    def watched_run(work: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
        def tell(event: Event) -> None:
            if isinstance(event, PhaseStarted) and event.phase == "denoise":
                begun.set()
            listener(event)

        return run(work, tell, cancelled)

    monkeypatch.setattr(Carrier, "load", stopping)
    monkeypatch.setattr(engine_module, "run", watched_run)
    with an_engine(t2v_folder) as engine:
        plan = engine.plan(a_request())
        resident = StreamPlan(n_blocks=6, device_resident=6)
        placed = [replace(p, stream=resident) if p.name == "denoise" else p for p in plan.phases]
        monkeypatch.setattr(engine, "plan", lambda *_, **__: replace(plan, phases=tuple(placed)))
        job = engine.submit(a_request())
        with pytest.raises(JobCancelled):
            job.result()
    assert len(loads) == 2


def test_while_the_file_is_written(
    t2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import penstock.engine.media.video as video

    convert, frames = video._convert, []

    def stopping(pixels: Any, index: int) -> Any:
        frames.append(index)
        if index == 2:
            job.cancel()
        return convert(pixels, index)

    with an_engine(t2v_folder) as engine:
        monkeypatch.setattr(video, "_convert", stopping)
        job = engine.submit(a_request(frames=9), tmp_path / "out.mp4")
        with pytest.raises(JobCancelled):
            job.result()
    assert frames == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []
