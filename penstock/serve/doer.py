"""How a worker's process does its orders, one at a time: how each ends, and how one is stopped."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from penstock.closing import Closing
from penstock.engine.run.events import Event
from penstock.engine.run.job import Job
from penstock.engine.run.report import JobResult
from penstock.errors import JobCancelled, PenstockError
from penstock.serve.order import COMPLETED, FAILED, STOPPED, Tell, error_values

log = logging.getLogger(__name__)


class Named(Protocol):
    """An order."""

    @property
    def id(self) -> str:
        """By which it is cancelled."""


_Order = TypeVar("_Order", bound=Named)


class Doer(Closing, Generic[_Order]):
    """`run` is called on one thread, `cancel` on any. What an order asks for, `done` does."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._job: tuple[str, Job] | None = None
        self._cancelled: str | None = None

    def run(self, order: _Order, tell: Tell) -> dict[str, Any]:
        """Do an order to its end, and say how it ended.

        Args:
            order: what to do.
            tell: called with what happens, on this thread.

        Returns:
            ``{"state": COMPLETED}`` and what `done` has returned, ``{"state": STOPPED}`` after
            `cancel`, or ``{"state": FAILED, "error": ...}``.
        """
        try:
            return {"state": COMPLETED, **self.done(order, tell)}
        except JobCancelled:
            return {"state": STOPPED}
        except Exception as error:  # noqa: BLE001 - told to the client by its kind; logged here
            if not isinstance(error, PenstockError):
                log.exception("order %s", order.id)
            return {"state": FAILED, "error": error_values(error)}
        finally:
            with self._guard:
                self._job, self._cancelled = None, None

    @abstractmethod
    def done(self, order: _Order, tell: Tell) -> dict[str, Any]:
        """Do an order; returns plain values.

        Raises:
            JobCancelled: it was stopped.
        """

    def watched(self, order: _Order, job: Job, hear: Callable[[Event], None]) -> JobResult:
        """Return the result of the job that does an order, which `cancel` stops.

        Args:
            order: what it does.
            job: as it has been started.
            hear: takes its events.

        Raises:
            PenstockError: as the job ended.
        """
        with self._guard:
            self._job = order.id, job
            if self._cancelled == order.id:
                job.cancel()
        for event in job.events():
            hear(event)
        return job.result()

    def cancel(self, name: str) -> None:
        """Stop the order of that id at its next block or tile, also where it is yet to begin; what
        it has done is kept."""
        with self._guard:
            self._cancelled = name
            if self._job is not None and self._job[0] == name:
                self._job[1].cancel()
