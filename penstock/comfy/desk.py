"""What the nodes' worker does with its orders: plans, jobs, and the rest of jobs."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.cli.memory import memory_told
from penstock.cli.plan_view import plan_view
from penstock.comfy.order import MAKE, PLAN, NodeOrder
from penstock.engine.engine import Engine
from penstock.engine.machine.memory import keep_overhead
from penstock.engine.model.opening import Opening
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import Settings, going_on, resolve
from penstock.engine.run.job import Job
from penstock.engine.run.jobs import (
    find_job,
    find_unfinished,
    list_jobs,
    new_job_folder,
    opening_of,
    remove_job,
)
from penstock.engine.run.stored import request_values, restored_request
from penstock.engine.store.journal import Journal
from penstock.errors import JournalError, OverBudget, StorageError
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.serve.doer import Doer
from penstock.serve.order import Tell
from penstock.serve.runner import Teller
from penstock.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

_FILES = ("image", "last_image", "after")
_WIDTH = 100
"""Of a plan as text, in characters."""

_WHITE = np.float32(255)


class Desk(Doer[NodeOrder]):
    """Does what the nodes ask for. Owns at most one engine, which keeps nothing between jobs."""

    def __init__(self) -> None:
        super().__init__()
        self._engine: Engine | None = None
        self._opened: object = None

    def done(self, order: NodeOrder, tell: Tell) -> dict[str, Any]:
        """Return for a plan ``{"text": ..., "fits": ...}``; of a job what was made
        (`_made`)."""
        if order.do == PLAN:
            return _planned(order)
        folder, job = self._begun(order) if order.do == MAKE else self._resumed(order)
        assert self._engine is not None
        tell({"event": "job", "name": folder.name, "plan": _told(job.plan)})
        made = self._made(order, job, tell)
        self._engine.unload()
        remove_job(folder)
        return made

    def close(self) -> None:
        """Give everything back."""
        engine, self._engine, self._opened = self._engine, None, None
        if engine is not None:
            engine.close()

    def _begun(self, order: NodeOrder) -> tuple[Path, Job]:
        """Return a job, or the rest of one that is the same and was not finished."""
        engine = self._opened_for(order)
        request = resolve(_settings(order), engine.model)
        plan = engine.plan(request, saved=True)
        _reserve_for(order, request)
        found = find_unfinished(request_values(request, engine.model.opening, plan))
        if found is not None:
            return found.folder, engine.resume(
                found.folder, order.video, force=True, preview_every=1
            )
        folder = new_job_folder()
        return folder, engine.submit(request, order.video, job_dir=folder, preview_every=1)

    def _resumed(self, order: NodeOrder) -> tuple[Path, Job]:
        folder = find_job(order.job) if order.job is not None else _newest()
        self.close()
        self._engine = Engine.reopen(opening_of(folder, Options(**order.options)))
        with Journal.open(folder) as journal:
            _reserve_for(order, restored_request(journal))
        return folder, self._engine.resume(folder, order.video, force=True, preview_every=1)

    def _opened_for(self, order: NodeOrder) -> Engine:
        opening = _opening(order)
        if self._engine is None or self._opened != opening:
            self.close()
            self._engine, self._opened = Engine.reopen(opening), opening
        return self._engine

    def _made(self, order: NodeOrder, job: Job, tell: Tell) -> dict[str, Any]:
        result = self.watched(order, job, Teller(tell, job.plan).hear)
        report = result.report
        keep_overhead("cpu" if report.on_cpu else "cuda", report.beside_bytes)
        if order.frames is not None:
            hand_over(result.video, Path(order.frames))
        return {"report": report.to_json(), "shape": list(result.video.shape)}


def _reserve_for(order: NodeOrder, request: GenerationRequest) -> None:
    if order.frames is not None:
        reserve(Path(order.frames), (request.frames, request.height, request.width, 3))


def _opening(order: NodeOrder) -> Opening:
    return replace(Opening.from_values(order.model), options=Options(**order.options))


def _settings(order: NodeOrder) -> Settings:
    files = {n: Path(order.settings[n]) for n in _FILES if order.settings.get(n) is not None}
    settings = Settings(**{**order.settings, **files})
    return settings if settings.after is None else _continued(settings, settings.after)


def _continued(settings: Settings, video: Path) -> Settings:
    """Return the settings that ``video`` was made with, from its last frame, which lies beside it
    then."""
    from PIL import Image

    from penstock.engine.media.seam import Clip

    clip = Clip.open(video)
    frame = video.with_suffix(f".{hashlib.sha256(clip.last.tobytes()).hexdigest()[:16]}.png")
    Image.fromarray(clip.last).save(frame)
    return going_on(replace(settings, after=None), clip, frame)


def _newest() -> Path:
    """Return the newest unfinished job.

    Raises:
        JournalError: there is none.
    """
    for info in list_jobs():
        if info.unfinished:
            return info.folder
    raise JournalError(
        "no unfinished job",
        expected="one that was interrupted or killed",
        remedy="`penstock jobs` lists all that there are.",
    )


def _planned(order: NodeOrder) -> dict[str, Any]:
    prepared = Prepared.reopen(_opening(order))
    try:
        request = resolve(_settings(order), prepared.model)
        plan = prepared.plan(request, saved=True)
    except OverBudget as error:
        return {"fits": False, "text": f"it does not fit: {error}"}
    finally:
        prepared.close()
    return {"fits": True, "text": f"{_told(plan)}\n\n{_handing(request)}"}


def _told(plan: Plan) -> str:
    """Return a plan as ``penstock plan`` prints it."""
    return plan_view(plan, _WIDTH, memory_told(plan))


def _handing(request: GenerationRequest) -> str:
    """Return what ComfyUI's process gets to hold."""
    nbytes = 4 * 3 * request.frames * request.width * request.height
    return (
        f"IMAGE    {request.frames} frames as fp32 are {format_bytes(nbytes)} of RAM in ComfyUI's "
        "process, and of disk until they are dropped; VIDEO alone makes none of them"
    )


def reserve(path: Path, shape: Sequence[int]) -> None:
    """Take the room on disk that frames of that shape need, before a job of hours begins.

    Raises:
        StorageError: there is none.
    """
    nbytes = 4 * math.prod(shape)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            elif shutil.disk_usage(path.parent).free < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            "the frames cannot be handed to ComfyUI",
            expected=f"{format_bytes(nbytes)} on the disk of its temp folder",
            found=f"{path}: {error.strerror}",
            remedy="Make room there, or ask for the video alone.",
        ) from error


def hand_over(video: Tensor, path: Path) -> None:
    """Write frames as IMAGE has them: fp32 (frames, height, width, 3) in 0..1, row by row, without
    a second copy of the whole.

    Args:
        video: uint8, of that shape, on the CPU.
        path: as `reserve` left it; another process maps it.
    """
    with path.open("r+b") as file:
        for frame in video.numpy():
            file.write((frame.astype(np.float32) / _WHITE).data)
