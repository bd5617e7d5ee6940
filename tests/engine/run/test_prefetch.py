"""The transformer's first blocks come while the phases before it work, and change nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan import work
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run import room
from penstock.engine.run.events import Event, PhaseEnded, PhaseStarted, Progress
from penstock.engine.run.pipeline import run
from penstock.engine.run.prefetch import Prefetcher
from penstock.engine.run.report import JobResult
from penstock.engine.run.stage import Run, Stage
from penstock.errors import JobCancelled, LedgerOverflow
from penstock.profiles.manifest import Prefetch
from penstock.profiles.plan import Plan
from penstock.profiles.prefetch import without_prefetch

BEFORE = ("text", "image", "encode", "context")

WHAT = Prefetch("denoise", "transformer", "decode", "vae decoder")


class Watch:
    """A listener: which phases ended while a stream was reading, and what they told."""

    def __init__(self, cancel_at: str = "") -> None:
        self.cancelled, self._cancel_at = threading.Event(), cancel_at
        self.reading: list[str] = []
        self.steps = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase == self._cancel_at:
            self.cancelled.set()
        if isinstance(event, Progress) and event.phase == "denoise":
            self.steps = event.step
        if isinstance(event, PhaseEnded) and streams():
            self.reading.append(event.report.name)


def streams() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("penstock-stream")]


def a_run(engine: Engine, plan: Plan, picture: Path, overlapped: bool, **more: Any) -> Run:
    return Run(
        model=engine.model,
        request=request(picture),
        plan=plan,
        device=torch.device("cpu"),
        overlapped=overlapped,
        output=None,
        overwrite=False,
        metadata=False,
        **more,
    )


def do(
    engine: Engine, plan: Plan, picture: Path, watch: Watch, overlapped: bool, **more: Any
) -> JobResult:
    job = a_run(engine, plan, picture, overlapped, **more)
    return run(job, watch, watch.cancelled)


def request(picture: Path) -> GenerationRequest:
    return GenerationRequest(
        prompt="a red circle moves",
        negative_prompt="",
        image=picture,
        width=64,
        height=48,
        frames=5,
        steps=2,
        seed=3,
    )


@pytest.fixture
def engine(i2v_folder: Path) -> Iterator[Engine]:
    with Engine.open(i2v_folder, device="cpu", vram="1GiB", ram="1GiB") as opened:
        yield opened


def test_first_blocks_come_while_text_and_image_are_encoded(engine: Engine, picture: Path) -> None:
    plan = engine.plan(request(picture))
    assert all(plan[name].prefetch_bytes > 0 for name in BEFORE)
    watch, alone = Watch(), Watch()
    result = do(engine, plan, picture, watch, overlapped=True)
    expected = do(engine, without_prefetch(plan, WHAT), picture, alone, overlapped=False)
    assert torch.equal(result.latents, expected.latents)
    assert watch.reading[:4] == list(BEFORE) and alone.reading == [] and streams() == []
    for report in result.report.phases:
        planned = plan[report.name]
        assert planned.prefetch_bytes <= report.measured_ram_bytes <= planned.ram_bytes
    denoise = next(report for report in result.report.phases if report.name == "denoise")
    in_steps = sum(step.flow.disk_to_host.nbytes for step in denoise.steps)
    assert denoise.read_bytes - in_steps > 0, "something came before the first step"


def test_the_decoder_comes_during_the_last_step(
    engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine.model.vae_decoder.rest
    loaded: list[object] = []
    begun: list[tuple[object, int]] = []
    load, begin = room.load_block, Prefetcher.begin

    def loading(layout: Any, **more: Any) -> Any:
        loaded.append(layout)
        return load(layout, **more)

    def beginning(prefetched: Prefetcher, layouts: Any, stream: Any) -> None:
        begun.append((layouts[0], watch.steps))
        begin(prefetched, layouts, stream)

    watch = Watch()
    monkeypatch.setattr(room, "load_block", loading)
    monkeypatch.setattr(Prefetcher, "begin", beginning)
    plan = engine.plan(request(picture))
    nbytes = plan["denoise"].prefetched_weights_bytes
    assert nbytes == decoder.nbytes == plan["decode"].prefetched_weights_bytes
    result = do(engine, plan, picture, watch, overlapped=True)
    assert not any(layout is decoder for layout in loaded)
    assert (decoder, 1) in begun, "one of two steps was done"
    alone = without_prefetch(plan, WHAT)
    expected = do(engine, alone, picture, Watch(), overlapped=True)
    assert any(layout is decoder for layout in loaded)
    assert torch.equal(result.video, expected.video)
    measured = {report.name: report.measured_ram_bytes for report in result.report.phases}
    assert nbytes <= measured["denoise"] <= plan["denoise"].ram_bytes
    assert nbytes <= measured["decode"] <= plan["decode"].ram_bytes


def test_what_was_dropped_is_there_no_more(engine: Engine, picture: Path) -> None:
    plan = engine.plan(request(picture))
    stage = Stage(a_run(engine, plan, picture, overlapped=True), Watch(), threading.Event())
    stage._prefetch_blocks()
    assert stage._prefetched.is_reading and stage.host_ledger.used > 0
    stage.close()
    assert not stage._prefetched.is_reading and stage.host_ledger.used == 0
    with ExitStack() as stack:
        assert stage._prefetched.take(engine.model.streamed.blocks, stack) is None


def test_the_sequential_reference_reads_nothing_ahead(engine: Engine, picture: Path) -> None:
    plan = engine.plan(request(picture))
    result = do(engine, plan, picture, Watch(), overlapped=False)
    for report in result.report.phases:
        planned = plan[report.name]
        held = planned.prefetch_bytes + planned.prefetched_weights_bytes
        if report.name in BEFORE:
            assert held > 0 and report.measured_ram_bytes <= planned.ram_bytes - held


def test_a_job_that_ends_before_its_steps_gives_everything_back(
    engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Stage] = []
    init = Stage.__init__

    def remembered(self: Stage, *arguments: object) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Stage, "__init__", remembered)
    with pytest.raises(JobCancelled):
        do(engine, engine.plan(request(picture)), picture, Watch("encode"), overlapped=True)
    assert streams() == [] and made[0].host_ledger.used == 0


def test_where_memory_runs_out_nothing_is_read_ahead_any_more(
    engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers turn out not to fit: the phase goes on without them."""
    asked: list[str] = []

    def begin(prefetched: Prefetcher, layouts: object, stream: object) -> None:
        asked.append("begin")
        raise LedgerOverflow("blocks read ahead do not fit", memory="RAM")

    monkeypatch.setattr(Prefetcher, "begin", begin)
    shrink = lambda plan, phase, resource: without_prefetch(plan, WHAT)  # noqa: E731
    watch = Watch()
    result = do(engine, engine.plan(request(picture)), picture, watch, True, shrink=shrink)
    assert any("no blocks read ahead" in notice for notice in result.report.notices)
    assert asked == ["begin"] and watch.reading == [] and streams() == []


def test_what_is_read_ahead_is_given_back_before_a_smaller_plan_is_made(
    engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what the next attempt has no room for."""
    made: list[Stage] = []
    init, encode = Stage.__init__, work.encode_pictures
    at_failure, at_planning = [], []

    def remembered(self: Stage, *arguments: object) -> None:
        init(self, *arguments)
        made.append(self)

    def fails_once(running: Stage, *arguments: Any) -> Any:
        if not at_failure:
            at_failure.append((len(streams()), running.host_ledger.used > 0))
            raise LedgerOverflow("a test", memory="RAM")
        return encode(running, *arguments)

    def shrink(plan: Plan, phase: str, resource: str) -> Plan:
        at_planning.append((len(streams()), made[0].host_ledger.used > 0))
        return without_prefetch(plan, WHAT)

    monkeypatch.setattr(Stage, "__init__", remembered)
    monkeypatch.setattr(work, "encode_pictures", fails_once)
    do(engine, engine.plan(request(picture)), picture, Watch(), True, shrink=shrink)
    assert at_failure[0][0] > 0 and at_failure[0][1], "something was being read"
    assert at_planning == [(0, False)]
