"""A job: one request being turned into a video on a thread of its own."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Iterator

from penstock.engine.events import Event, Notice
from penstock.engine.report import JobResult
from penstock.errors import JobCancelled
from penstock.profiles.plan import Plan

Work = Callable[[Callable[[Event], None], threading.Event], JobResult]


class Job:
    """A running job. Made by :meth:`penstock.Engine.submit`.

    Args:
        plan: that it starts under.
        work: does the job; takes a listener for events and the cancel flag.
    """

    def __init__(self, plan: Plan, work: Work) -> None:
        self.plan = plan
        self._work = work
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._result: JobResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="penstock-job")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work(self._events.put, self._cancelled)
        except BaseException as error:  # noqa: BLE001 - handed to the caller by result()
            _forget_locals(error)
            self._error = error
        finally:
            self._events.put(None)

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Ask the job to stop at the next block or tile; returns at once."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._events.put(Notice("stopping at the next block or tile"))

    def events(self) -> Iterator[Event]:
        """Every event, as it happens, until the job ends. For one consumer."""
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)

    def wait(self) -> None:
        """Wait until the job has ended, well or not."""
        self._thread.join()

    def result(self, timeout_s: float | None = None) -> JobResult:
        """Wait for the end and return what was made.

        Raises:
            TimeoutError: the job is still running after ``timeout_s`` seconds.
            JobCancelled: it was cancelled.
            PenstockError: whatever made it fail, as it was raised.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the job is still running after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise JobCancelled("the job ended without a result")
        return self._result


def _forget_locals(error: BaseException | None) -> None:
    """Let go of the tensors that the frames of an error's traceback hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
