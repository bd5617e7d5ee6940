"""A job: one request being turned into a video on a thread of its own."""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable

from penstock.engine.run.eventlog import EventLog, Events
from penstock.engine.run.events import Event, Notice
from penstock.engine.run.report import JobResult
from penstock.errors import JobCancelled
from penstock.profiles.plan import Plan

Work = Callable[[Callable[[Event], None], threading.Event], JobResult]


class Job:
    """A running job. Made by :meth:`penstock.Engine.submit`; its methods may be called on any
    thread.

    Args:
        plan: that it starts under.
        work: does the job; takes a listener for events and the cancel flag.

    Attributes:
        plan: that it started under; what changed on the way is an event and in the report.
    """

    def __init__(self, plan: Plan, work: Work) -> None:
        self.plan = plan
        self._work = work
        self._log = EventLog()
        self._cancelled = threading.Event()
        self._result: JobResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="penstock-job")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work(self._log.add, self._cancelled)
        except BaseException as error:  # noqa: BLE001 - handed to the caller by result()
            _without_frames(error)
            self._error = error
        finally:
            gc.collect()  # diffusers' schedulers and frames lie in cycles, and hold tensors
            self._log.end()

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Ask the job to stop; returns at once.

        The answer is a `Notice` among the events, before anything else happens. After it the job
        finishes at most the block or the VAE tile that it is at, gives everything back and ends
        with `JobCancelled`; one that waits for its turn ends at once. A job that is done stays as
        it is.

        Raises:
            Nothing.
        """
        if not self._cancelled.is_set():
            self._log.add(Notice("stopping at the next block or tile"))
            self._cancelled.set()

    def events(self) -> Events:
        """Return every event from the job's first, as it happens, until the job ends.

        For ``for`` and ``async for``, and for any number of consumers: see `penstock.Events`.

        Raises:
            Nothing: how the job ended is told by :meth:`result`.
        """
        return Events(self._log)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the job has ended, well or not, or ``timeout_s`` seconds have passed.

        Returns:
            Whether it has ended.

        Raises:
            RuntimeError: called on the job's own thread (from ``on_step``).
        """
        self._thread.join(timeout_s)
        return self.done

    def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the end and return what was made.

        Raises:
            TimeoutError: the job is still running after ``timeout_s`` seconds.
            JobCancelled: it was cancelled.
            PenstockError: whatever made it fail, as it was raised.
            Exception: what ``on_step`` has raised, as it was raised.
        """
        if not self.wait(timeout_s):
            raise TimeoutError(f"the job is still running after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise JobCancelled("the job ended without a result")
        return self._result


class JobTraceback(Exception):  # noqa: N818 - as the standard library's own of this kind
    """Where on the job's thread an error was raised, as text: the cause of what `result` raises."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def _without_frames(error: BaseException) -> None:
    """Put text in the place of an error's tracebacks: their frames hold tensors, also when they
    are cleared, by the closures of their functions."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    last, following = error, error.__cause__ or error.__context__
    while following is not None:
        last.__traceback__ = None
        last, following = following, following.__cause__ or following.__context__
    last.__traceback__ = None
    last.__cause__ = JobTraceback(text)
