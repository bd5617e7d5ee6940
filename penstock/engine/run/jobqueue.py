"""The jobs of one engine: one runs at a time, the others wait for their turn."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from penstock.engine.run.ending import Ending
from penstock.engine.run.events import Listener
from penstock.engine.run.job import Job
from penstock.engine.run.report import JobResult
from penstock.engine.run.stage import Run
from penstock.errors import DeviceLost, JobCancelled, UsageError

TURN_POLL_S = 0.05
"""How often a job that waits for its turn looks whether it was cancelled."""

Runner = Callable[[Run, Listener, threading.Event], JobResult]


class JobQueue:
    """Starts jobs, each on a thread of its own. Safe to use from any thread.

    It keeps no job alive: one that is done is gone, with its frames, when its user lets go of it.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._guard = threading.Lock()
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        self._closed = False
        self._lost: DeviceLost | None = None

    @property
    def device_lost(self) -> bool:
        """Whether a job has lost the device: this process cannot use it again."""
        return self._lost is not None

    def check_open(self) -> None:
        """Whether a job may be started.

        Raises:
            DeviceLost: an earlier job has lost the device.
            UsageError: the queue is closed.
        """
        if self._lost is not None:
            raise self._lost
        if self._closed:
            raise UsageError("the engine is closed", remedy="Open another one.")

    def start(self, work: Run, runner: Runner) -> Job:
        """Return a job that does ``work`` by ``runner`` when its turn comes.

        Raises:
            DeviceLost, UsageError: as :meth:`check_open`; the work's keeper is closed.
        """
        with self._guard:
            try:
                self.check_open()
                job = Job(work.plan, lambda *line: self._do(work, runner, *line))
            except BaseException:
                work.keeper.close()
                raise
            self._jobs.add(job)
        return job

    def _do(
        self, work: Run, runner: Runner, listener: Listener, cancelled: threading.Event
    ) -> JobResult:
        try:
            with Ending(work.keeper, work.device):
                self._take_turn(cancelled)
            try:
                if self._lost is not None:
                    raise self._lost
                return runner(work, listener, cancelled)
            finally:
                self._turn.release()
        except DeviceLost as error:
            self._lost = error
            raise
        finally:
            work.keeper.close()

    def _take_turn(self, cancelled: threading.Event) -> None:
        while not self._turn.acquire(timeout=TURN_POLL_S):
            if cancelled.is_set():
                raise JobCancelled("the job was cancelled before its turn came")

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Let no job run until the context ends.

        Raises:
            UsageError: one is running.
        """
        if not self._turn.acquire(blocking=False):
            raise UsageError(
                "a job is running",
                expected="an idle engine",
                remedy="Cancel the job, or wait for it, and unload then.",
            )
        try:
            yield
        finally:
            self._turn.release()

    def close(self) -> None:
        """Start no more jobs, cancel those that there are, and wait for their end.

        Raises:
            RuntimeError: called on a job's own thread.
        """
        with self._guard:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        for job in jobs:
            job.wait()
