"""Measures denoising steps on the engine's own path: the planner, the stages and the streams of a
job, with a clock beside them.

What a job does not do, a benchmark does not do either: nothing here computes, reads or copies.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from penstock.closing import Closing
from penstock.engine.bench.machine import SAMPLE_BYTES, links, machine
from penstock.engine.bench.result import (
    BenchResult,
    Links,
    PhaseFigures,
    Recipe,
    StepFigures,
)
from penstock.engine.engine import Engine
from penstock.engine.machine.disk import forget
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import (
    Event,
    Listener,
    PhaseEnded,
    PhaseMonitor,
    PhaseStarted,
    Progress,
)
from penstock.engine.run.pipeline import work_of
from penstock.engine.run.report import PhaseReport
from penstock.engine.run.stage import Run, Stage
from penstock.errors import UsageError
from penstock.offload.allocator import allocator_capped
from penstock.offload.layout import BlockLayout
from penstock.offload.streamer import BlockStream, StreamStats
from penstock.offload.tiers import release_cached
from penstock.profiles.plan import Plan, StreamPlan
from penstock.profiles.policy import AUTO

_SAMPLING_S = 0.01


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        request: its steps are all of them, those before the counted ones included.
        warmup: steps that do not count; the first one carries the cold start.
        name: of the model, for the recipe.
        whole: every phase, not denoising alone.
    """

    request: GenerationRequest
    warmup: int
    name: str
    whole: bool = False
    overlapped: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.request.steps:
            raise UsageError(
                "illegal number of warm-up steps",
                expected="0 or more, and at least one step that counts",
                found=f"{self.warmup} of {self.request.steps}",
            )


@torch.no_grad()
def measure(
    engine: Engine,
    asked: Asked,
    listener: Listener = lambda event: None,
    *,
    plan: Plan | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    reached: Links | None = None,
) -> BenchResult:
    """Run a job's phases and say how long they took, what they moved and what they held.

    Args:
        engine: the opened model, under the budgets to measure.
        asked: what to run.
        listener: receives the job's own events.
        plan: to run under (the engine's for the request by default).
        sample_bytes: read of the model's file to know the disk's rate.
        reached: what disk and link reach, if that was measured before (measured now by default).

    Raises:
        OverBudget: no plan fits. Whatever a job raises.
    """
    plan = plan or engine.plan(asked.request)
    device = torch.device(engine.hardware.place)
    watch = _Watch(listener, _clock(device))
    run = engine.run_of(asked.request.with_seed(), plan)
    stage = MeasuredStage(replace(run, overlapped=asked.overlapped), watch, threading.Event())
    watch.stage = stage
    for message in run.notices:
        stage.monitor.notice(message)
    stage.prepare()
    files = stage.model.streamed.source.raw.stamps
    if reached is None:
        reached = links(device, max(files, key=lambda path: path.stat().st_size), sample_bytes)
    for path in files:
        forget(path)
    release_cached(device)  # what measuring the links has left behind
    with allocator_capped(device, plan.vram_limit_bytes), Memory(device) as memory:
        watch.memory = memory
        latents = _run(stage, whole=asked.whole)
    steps = watch.steps()
    return BenchResult(
        recipe=_recipe(stage, asked, plan, len(steps) - asked.warmup),
        machine=machine(device),
        links=reached,
        warmup=steps[: asked.warmup],
        steps=steps[asked.warmup :],
        phases=tuple(watch.phases),
        placement=_placement(plan),
        vram_limit_bytes=plan.vram_limit_bytes,
        ram_limit_bytes=plan.ram_limit_bytes,
        latents_sha256=_digest(latents),
        notices=tuple(stage.monitor.notices),
    )


def _run(stage: Stage, *, whole: bool) -> Tensor:
    work = work_of(stage)
    found = {} if whole else work.drawn(stage)
    for phase in stage.plan.phases:
        if phase.name in work.phases and (whole or phase.name == "denoise"):
            work.phases[phase.name](stage, found)
    latents: Tensor = found["latents"]
    return latents


def _recipe(stage: Stage, asked: Asked, plan: Plan, steps: int) -> Recipe:
    request, blocks = asked.request, len(stage.model.streamed.blocks)
    stored, options = stage.model.streamed.source, plan.options
    return Recipe(
        model=f"{asked.name}, {blocks} blocks, {stored.nbytes:,} bytes",
        weight_format=stored.label(),
        width=request.width,
        height=request.height,
        frames=request.frames,
        steps=steps,
        warmup=asked.warmup,
        branches=2 if request.uses_guidance else 1,
        device=stage.device.type,
        compute=_computing(plan),
        profile=options.profile or AUTO,
        vram=str(options.vram or ""),
        ram=str(options.ram or ""),
        chunk_tokens=plan["denoise"].chunk_tokens,
        whole=asked.whole,
        overlapped=asked.overlapped,
        rules={name: str(word) for name, word in options.given.items() if name not in _TOLD},
    )


_TOLD = ("vram", "ram", "profile", "device", "format", "compute", "attention")
"""Options that a recipe's own fields tell."""


def _computing(plan: Plan) -> str:
    """Return the path of the matrices, and what attends, where that is not torch."""
    if plan.attention == "sdpa":
        return plan.compute_path
    return f"{plan.compute_path}, {plan.attention} attention"


def _placement(plan: Plan) -> dict[str, int]:
    stream = plan["denoise"].stream
    assert stream is not None
    return asdict(stream) | {
        "disk_blocks": stream.disk_blocks,
        "branches_a_visit": plan["denoise"].branches,
        "cross_kv_on_device": int(plan["denoise"].cross_kv_on_device),
    }


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


class MeasuredStage(Stage):
    """A stage whose streams' statistics can be read while they run."""

    def __init__(self, job: Run, listener: Listener, cancelled: threading.Event) -> None:
        super().__init__(job, listener, cancelled)
        self.streams: dict[str, list[StreamStats]] = {}

    @contextmanager
    def stream(
        self,
        layouts: Sequence[BlockLayout],
        plan: StreamPlan | None,
        phase: PhaseMonitor,
        passes: int,
        sure: int | None = None,
    ) -> Iterator[BlockStream]:
        """As `Stage.stream`."""
        with super().stream(layouts, plan, phase, passes, sure) as stream:
            self.streams.setdefault(phase.name, []).append(stream.stats)
            yield stream

    def moved(self, phase: str) -> Moved:
        """Return all that the phase's streams have moved and waited so far."""
        return Moved.of(self.streams.get(phase, ()))


@dataclass(frozen=True)
class Moved:
    """Some streams' counters at one moment, summed; the names are those of `StreamStats`."""

    read_bytes: int
    direct_bytes: int
    copied_bytes: int
    read_s: float
    copy_s: float
    staging_wait_s: float
    disk_wait_s: float
    slot_wait_s: float
    compute_wait_s: float

    @classmethod
    def of(cls, streams: Sequence[StreamStats]) -> Moved:
        """Now."""
        names = [each.name for each in fields(cls)]
        return cls(**{name: sum(getattr(stats, name) for stats in streams) for name in names})


Mark = Callable[[], Callable[[], float]]
"""Marks a moment; what it gives tells, once the device has passed it, the moment in seconds."""


def _clock(device: torch.device) -> Mark:
    return _cuda_mark() if device.type == "cuda" else _host_mark


def _host_mark() -> Callable[[], float]:
    now = time.perf_counter()
    return lambda: now


def _cuda_mark() -> Mark:
    """Return the time by the device's own clock, so that nothing has to wait for it."""
    cuda: Any = torch.cuda  # untyped in torch
    origin = cuda.Event(enable_timing=True)
    origin.record()

    def mark() -> Callable[[], float]:
        event = cuda.Event(enable_timing=True)
        event.record()

        def seconds() -> float:
            event.synchronize()
            return float(origin.elapsed_time(event)) / 1000

        return seconds

    return mark


@dataclass
class _Watch:
    """Listens to a job: marks the steps, and takes each phase's figures at its end."""

    listener: Listener
    mark: Mark
    stage: MeasuredStage | None = None
    memory: Memory | None = None
    phases: list[PhaseFigures] = field(default_factory=list)
    _marks: list[tuple[Callable[[], float], Moved]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Take note of ``event``, and pass it on."""
        if isinstance(event, PhaseStarted) and self.memory is not None:
            self.memory.reset()
        if isinstance(event, PhaseStarted | Progress) and event.phase == "denoise":
            assert self.stage is not None
            self._marks.append((self.mark(), self.stage.moved("denoise")))
        if isinstance(event, PhaseEnded) and self.memory is not None:  # packing comes before
            self.phases.append(self._figures(event.report))
        self.listener(event)

    def _figures(self, report: PhaseReport) -> PhaseFigures:
        assert self.stage is not None and self.memory is not None
        stats, plan = self.stage.moved(report.name), self.stage.plan[report.name]
        waits = {name: s for name, s in asdict(stats).items() if name.endswith("_wait_s")}
        process_bytes, allocator_bytes = self.memory.peaks()
        return PhaseFigures(
            name=report.name,
            seconds=report.seconds,
            predicted_s=plan.seconds,
            bound=plan.bound,
            read_bytes=stats.read_bytes,
            copied_bytes=stats.copied_bytes,
            read_s=stats.read_s,
            copy_s=stats.copy_s,
            stall_s=stats.compute_wait_s,
            waits_s=waits,
            predicted_vram_bytes=report.predicted_vram_bytes,
            ledger_vram_bytes=report.measured_vram_bytes,
            predicted_ram_bytes=report.predicted_ram_bytes,
            ledger_ram_bytes=report.measured_ram_bytes,
            process_bytes=process_bytes,
            allocator_bytes=allocator_bytes,
        )

    def steps(self) -> tuple[StepFigures, ...]:
        """Return all steps; the first begins with the phase, and so holds the cold start."""
        return tuple(
            StepFigures(
                seconds=end() - begin(),
                read_bytes=after.read_bytes - before.read_bytes,
                copied_bytes=after.copied_bytes - before.copied_bytes,
                stall_s=after.compute_wait_s - before.compute_wait_s,
            )
            for (begin, before), (end, after) in zip(self._marks, self._marks[1:], strict=False)
        )


class Memory(Closing):
    """The process's memory by the operating system, and torch's CUDA allocator: peaks that no
    ledger of ours has a part in. A context manager.

    Args:
        device: whose allocator is asked.
    """

    def __init__(self, device: torch.device) -> None:
        import psutil

        self._device, self._process = device, psutil.Process()
        self._base = self._peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="penstock-bench", daemon=True)

    def _now(self) -> int:
        return int(self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLING_S):
            self._peak = max(self._peak, self._now())

    def reset(self) -> None:
        """Begin new peaks."""
        self._peak = self._now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peaks(self) -> tuple[int, int]:
        """Since the last `reset`: how far the process rose above its start, and the allocator."""
        process = max(self._peak, self._now()) - self._base
        cuda = self._device.type == "cuda"
        return max(0, process), torch.cuda.max_memory_reserved(self._device) if cuda else 0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def close(self) -> None:
        """End the watching."""
        self._stop.set()
        self._thread.join()
