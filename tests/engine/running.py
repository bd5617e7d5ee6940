"""Small jobs for the tests of the engine's own interface."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Progress
from penstock.errors import JobCancelled

REQUEST = GenerationRequest(
    prompt="a cat", negative_prompt="", width=48, height=32, frames=5, steps=3, seed=3
)


def a_request(**changes: Any) -> GenerationRequest:
    """A small text-to-video request."""
    return replace(REQUEST, **changes)


def an_engine(folder: Path, **options: Any) -> Engine:
    """On the CPU, with room."""
    return Engine.open(folder, device="cpu", **({"vram": "200MiB", "ram": "200MiB"} | options))


class Gate:
    """An ``on_step`` that holds its job at a step until it is let go."""

    def __init__(self, step: int = 1) -> None:
        self._step = step
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self, step: int, latents: Any) -> None:
        """Wait at the step."""
        if step == self._step:
            self.reached.set()
            assert self._open.wait()

    def open(self) -> None:
        """Let the job go."""
        self._open.set()


def stop_after_a_step(engine: Engine, request: GenerationRequest, folder: Path) -> None:
    """A kept job that ends after its first step."""
    job = engine.submit(request, job_dir=folder)
    for event in job.events():
        if isinstance(event, Progress) and event.phase == "denoise":
            job.cancel()
    with pytest.raises(JobCancelled):
        job.result()


def stop_at(step: int, engine: Engine, request: GenerationRequest, folder: Path) -> None:
    """Keep a job in ``folder`` that ends after so many steps, of whichever transformer."""
    job = engine.submit(request, job_dir=folder)
    for event in job.events():
        if isinstance(event, Progress) and (event.unit, event.step) == ("step", step):
            job.cancel()
    with pytest.raises(JobCancelled):
        job.result()
