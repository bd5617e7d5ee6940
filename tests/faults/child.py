"""A job in a forked process that is killed with SIGKILL, at a failpoint or at any moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from penstock.engine import engine as engine_module
from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Event, Progress
from penstock.engine.run.jobs import list_jobs, remove_job
from penstock.engine.store.durable import FileOps
from tests.faults.storage import CHANGING

FINISHED, CRASHED = 0, 99


@dataclass(frozen=True)
class Attempt:
    """What a child did: the steps it finished, and whether it was killed."""

    steps: tuple[int, ...]
    failpoints: int
    was_killed: bool


@dataclass(frozen=True)
class Task:
    """A job to be done by children: an engine opened by the parent, and where things go."""

    engine: Engine
    request: GenerationRequest
    folder: Path

    @property
    def output(self) -> Path:
        """The mp4."""
        return self.folder / "out.mp4"

    @property
    def job(self) -> Path:
        """The job's directory."""
        return self.folder / "jobs" / "job"

    def attempt(
        self, *, kill_at: int = 0, kill_at_step: int = 0, kill_after: int | None = None
    ) -> Attempt:
        """Start or resume the job in a child.

        Args:
            kill_at: number of the failpoint at which it is killed, from 1; 0: never.
            kill_at_step: the step that is its last, likewise.
            kill_after: how many failpoints it has passed when it is killed from outside, wherever
                it is by then; None: never.
        """
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _in_child(lambda: self._do(_Failpoints(writer, kill_at, kill_at_step)))
        os.close(writer)
        told: list[tuple[str, int]] = []
        if kill_after == 0:
            os.kill(pid, signal.SIGKILL)
        for kind, number in _read(reader):
            told.append((kind, number))
            if (kind, number) == ("f", kill_after):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == FINISHED, "the child failed: see its output"
        assert not killed or os.WTERMSIG(status) == signal.SIGKILL
        return Attempt(
            steps=tuple(number for kind, number in told if kind == "s"),
            failpoints=max((number for kind, number in told if kind == "f"), default=0),
            was_killed=killed,
        )

    def _do(self, failpoints: _Failpoints) -> None:
        failpoints.intercept_files()
        failpoints.intercept_events()
        # Whoever lost the process starts the command again: it resumes what there is. A job that
        # died before its first record is listed as damaged: it is removed and begun again.
        info = next((each for each in list_jobs(self.job.parent) if each.folder == self.job), None)
        if info is not None and info.record is None:
            remove_job(self.job)
        if info is not None and info.record is not None:
            job = self.engine.resume(self.job)
        else:
            job = self.engine.submit(self.request, self.output, force=True, job_dir=self.job)
        job.result()


class _Failpoints:
    def __init__(self, writer: int, kill_at: int, kill_at_step: int) -> None:
        self._writer, self._kill_at, self._kill_at_step = writer, kill_at, kill_at_step
        self._numbers = count(1)  # atomic: the writer's thread takes them too

    def reach(self) -> None:
        """One more failpoint."""
        number = next(self._numbers)
        self.tell("f", number)
        if number == self._kill_at:
            _die()

    def tell(self, kind: str, number: int) -> None:
        """Let the parent know, also beyond a kill."""
        os.write(self._writer, f"{kind} {number}\n".encode())

    def intercept_files(self) -> None:
        """Failpoints before and after every changing file operation."""
        for name in CHANGING:
            setattr(FileOps, name, self._around(getattr(FileOps, name)))

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.reach()
            result = original(*arguments)
            self.reach()
            return result

        return call

    def intercept_events(self) -> None:
        """Failpoints at every event: phases begin and end, blocks, steps and frames are done."""
        original = engine_module.run

        def run(work: Any, listener: Callable[[Event], None], cancelled: Any) -> Any:
            def tap(event: Event) -> None:
                if isinstance(event, Progress) and event.phase.startswith("denoise"):
                    self.tell("s", event.step)
                    if event.step == self._kill_at_step:
                        _die()
                self.reach()
                listener(event)

            return original(work, tap, cancelled)

        engine_module.run = run  # type: ignore[assignment]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_child(body: Callable[[], None]) -> None:
    code = CRASHED
    try:
        body()
        code = FINISHED
    finally:
        if code == CRASHED:
            import traceback

            traceback.print_exc()
        os._exit(code)


def _read(reader: int) -> Iterator[tuple[str, int]]:
    with os.fdopen(reader) as lines:
        for line in lines:
            if line.endswith("\n"):
                kind, number = line.split()
                yield kind, int(number)


def assert_at_most_one_step_redone(before: Attempt, after: Attempt) -> int:
    """How many finished steps of ``before`` the attempt ``after`` did again: 0 or 1."""
    if not before.steps or not after.steps:
        return 0
    redone = before.steps[-1] - (after.steps[0] - 1)
    assert redone <= 1, f"{before.steps} and then {after.steps}"
    assert after.steps == tuple(range(after.steps[0], after.steps[-1] + 1))
    return max(0, redone)
