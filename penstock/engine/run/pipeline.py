"""The story of one job, top to bottom: the phases of its plan, in the plan's order.

What each phase does, its family says (`Work`). Each loads what it needs, computes, and gives
everything back; only small results pass from one to the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from penstock._version import __version__
from penstock.engine.machine.memory import ProcessMemory
from penstock.engine.media.seam import joined
from penstock.engine.media.video import Sound, WrittenVideo, write_video
from penstock.engine.request.generation import frame_rate, noise_of
from penstock.engine.run.ending import Ending
from penstock.engine.run.events import Listener, PhaseMonitor
from penstock.engine.run.report import JobResult, RunReport
from penstock.engine.run.stage import Run, Stage
from penstock.engine.software import versions
from penstock.engine.store.sums import PIECE_BYTES, Sums, how_told
from penstock.offload.allocator import allocator_capped
from penstock.offload.device import made_current

log = logging.getLogger(__name__)

STEERED = "on_step replaced the latents: the request and the seed alone do not lead to this video"

Products = dict[str, Any]
"""What the phases have left so far, by name: small results, "latents", and at last "video" and,
where the model makes one, "sound" (`penstock.engine.media.video.Sound`)."""


@dataclass(frozen=True)
class SavePoint:
    """What a kept job has of its phases so far.

    Attributes:
        before: the phase that goes on from here.
        restore: gives what was kept, or None.
        keep: keeps it.
    """

    before: str
    restore: Callable[[Stage], Products | None]
    keep: Callable[[Stage, Products], None]


@dataclass(frozen=True)
class Work:
    """How a family's phases run.

    Attributes:
        phases: by name; each adds what it leaves. One that is planned with the phase after it, and
            runs inside it, has no entry.
        saves: in the order of the phases.
        drawn: what the phases before "denoise" would have left, drawn at random, for benchmarks.
    """

    phases: Mapping[str, Callable[[Stage, Products], None]]
    saves: tuple[SavePoint, ...]
    drawn: Callable[[Stage], Products]


class WorkFamily(Protocol):
    """What a family's module ``family`` offers to this room, beside `Family`."""

    def work(self) -> Work:
        """Return how its phases run."""


@torch.no_grad()
def run(job: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
    """Do the whole job and report it.

    Raises:
        JobCancelled: ``cancelled`` was set; nothing is written.
        PenstockError: whatever went wrong, with the remedy.
    """
    started = time.perf_counter()
    stage = Stage(job, listener, cancelled)
    capped = allocator_capped(job.device, job.plan.vram_limit_bytes)
    with Ending(job.keeper, job.device), made_current(job.device), capped, closing(stage):
        for message in (*job.notices, *(warning.message for warning in job.request.warnings)):
            stage.monitor.notice(message)
        know_sources(stage)
        _log_request(job)
        importing = time.perf_counter()
        work = work_of(stage)
        imports_s = job.imports_s + time.perf_counter() - importing
        found = run_phases(stage, work)
        asked, video, written = job.output, found["video"], None
        if asked is not None:
            sound = found.get("sound")
            written = stage.attempt("mux", lambda: mux(stage, video, asked, sound))
        if job.keeper.steered:
            stage.monitor.notice(STEERED)
        for problem in job.keeper.problems:
            stage.monitor.notice(problem)
        seconds = time.perf_counter() - started
        report = _report(stage, written, seconds, imports_s, found.get("sound"))
        job.keeper.finished(report)
    return JobResult(report, found["latents"], video, found.get("sound"))


def know_sources(stage: Stage) -> None:
    """Keep checksums of every byte that a kept job's result depends on, before any of it is made:
    a resume then notices whatever has changed."""
    if not stage.keeper.lacks_sums():
        return
    with stage.host_ledger.reserve("files being read for their checksums", PIECE_BYTES):
        sums = {n: Sums().of(p, stage.monitor.check) for n, p in stage.job.sources.items()}
    stage.keeper.save_sums({name: each.value for name, each in sums.items()})
    stage.monitor.notice(f"the model's files are known for a resume: {how_told(sums.values())}")


def _log_request(job: Run) -> None:
    """Log what is made, at "info"; what it shall show, at "debug" alone."""
    shown = ("prompt", "negative_prompt", "image", "last_image", "after")
    values = asdict(job.request)
    log.info("makes %s", {name: value for name, value in values.items() if name not in shown})
    log.debug("shows %s", {name: values[name] for name in shown})


def work_of(stage: Stage) -> Work:
    """Return how the phases of the job's family run."""
    return cast("WorkFamily", stage.model.source.family).work()


def run_phases(stage: Stage, work: Work) -> Products:
    """Return what the phases leave: those of the plan, in its order, from the last save point
    on."""
    names = [phase.name for phase in stage.plan.phases if phase.name in work.phases]
    found: Products = {}
    at = 0
    for save in reversed(work.saves):
        restored = save.restore(stage)
        if restored is not None:
            log.info("goes on from what was kept before %s", save.before)
            found, at = restored, names.index(save.before)
            break
    streamed = stage.model.manifest.prefetch.stream
    if streamed in names[at:]:
        stage.prepare()
    keeps = {save.before: save.keep for save in work.saves}
    for index, name in enumerate(names[at:], start=at):
        if index > at and name in keeps:
            keeps[name](stage, found)
        work.phases[name](stage, found)
    return found


def mux(stage: Stage, video: Tensor, output: Path, sound: Sound | None = None) -> WrittenVideo:
    """Write the frames, and the sound where there is one, to ``output``, or where that is taken by
    now to a free name like it; after those of the video that this one goes on from."""
    job, after = stage.job, stage.job.request.after
    with stage.phase("mux", len(video), "frame") as (_, phase):
        frames = _counted_frames(video, phase)
        written = write_video(
            output,
            frames if after is None else joined(after, frames),
            frame_rate(job.request.fps),
            metadata=_metadata(job) if job.metadata else None,
            overwrite=job.overwrite,
            or_beside=True,
            finished=stage.keeper.writing_output,
            sound=sound,
        )
    if written.path != output:
        stage.monitor.notice(f"{output} is another file by now: the video is in {written.path}")
    return written


def _counted_frames(video: Tensor, phase: PhaseMonitor) -> Iterator[Any]:
    for frame in video.numpy():
        yield frame
        phase.advance()


def _metadata(job: Run) -> dict[str, Any]:
    """Return what the file tells of itself: all settings but the place of the picture."""
    request = job.request
    shift = job.model.flow_shift(request.width, request.height, request.shift)
    settings = asdict(request) | {"shift": shift, "penstock": __version__}
    steered = {"steered": True} if job.keeper.steered else {}
    hidden = ("image", "last_image", "after", "grid")
    return {name: settings[name] for name in settings if name not in hidden} | steered


def _report(
    stage: Stage,
    written: WrittenVideo | None,
    seconds: float,
    imports_s: float,
    sound: Sound | None,
) -> RunReport:
    job, monitor, memory = stage.job, stage.monitor, ProcessMemory.peak()
    request = job.request
    assert request.seed is not None
    return RunReport(
        output=None if written is None else str(written.path),
        frames=request.frames if written is None else written.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        seed=request.seed,
        seconds=seconds,
        imports_s=imports_s,
        vram_limit_bytes=job.plan.vram_limit_bytes,
        ram_limit_bytes=job.plan.ram_limit_bytes,
        allocated_vram_bytes=_allocated_bytes(job.device),
        weight_format=job.plan.weight_format,
        compute=job.plan.compute,
        compute_path=job.plan.compute_path,
        attention=job.plan.attention,
        phases=tuple(monitor.phases),
        notices=tuple(monitor.notices),
        versions=versions(),
        steered=job.keeper.steered,
        residual=stage.plan.residual,
        on_cpu=job.device.type == "cpu",
        process_peak_bytes=memory.resident_bytes,
        group_peak_bytes=memory.group_bytes,
        options=job.plan.options,
        timesteps=job.model.official.timesteps(
            request.video_shape, request.steps, noise_of(request)
        ),
        computed_steps=stage.computed_steps,
        sound_s=0.0 if sound is None else sound.seconds,
    )


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
