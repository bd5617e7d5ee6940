"""Requests given out to workers: each to one at a time, and to another if that one dies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.batch.checking import plain, settled
from penstock.batch.folder import OutputFolder
from penstock.batch.lines import Line
from penstock.batch.results import Result
from penstock.errors import PenstockError
from penstock.serve.crew import Worker
from penstock.serve.runner import Order

MOST_DEATHS = 3
"""Workers that may die over a request until that is to blame."""

WORKER_DIED = "worker_died"
"""Code of the error of a request over which they have."""


@dataclass
class Task:
    """A request that waits, or is being made.

    Attributes:
        line: the request.
        deaths: workers that have died over it.
    """

    line: Line
    deaths: int = 0


@dataclass(frozen=True)
class Began:
    """A request is begun.

    Attributes:
        name: its own.
        worker: that makes it.
        began: as `Result.began`.
        deaths: workers that have died over it before.
    """

    name: str
    worker: str
    began: str
    deaths: int


@dataclass(frozen=True)
class Told:
    """A worker tells of a request: plain values, as `penstock.serve.runner.Runner.run` gives them."""

    name: str
    worker: str
    event: dict[str, Any]


News = Began | Told | Result


class Dispatch:
    """Makes a list's requests, and notes what becomes of them.

    Args:
        folder: of the videos.
        lines: the requests, in this order; those of a worker's present model first.
        tell: of all that happens.
    """

    def __init__(
        self, folder: OutputFolder, lines: Sequence[Line], tell: Callable[[News], None]
    ) -> None:
        self._folder, self._tell = folder, tell
        self._waiting = deque(Task(line) for line in lines)
        self._running = 0
        self._changed = asyncio.Condition()
        self._stopped = False

    async def run(self, workers: Sequence[Worker]) -> bool:
        """Make them; returns whether all of them were tried, and not stopped.

        Raises:
            StorageError: a result cannot be noted.
        """
        slots = [asyncio.ensure_future(self._slot(worker)) for worker in workers]
        try:
            await asyncio.gather(*slots)
        finally:
            self.stop(workers)
            await asyncio.gather(*slots, return_exceptions=True)
        return not self._waiting

    def stop(self, workers: Sequence[Worker]) -> None:
        """Begin nothing more, and stop what runs; what is done of it is kept."""
        self._stopped = True
        for worker in workers:
            worker.cancel()

    async def _slot(self, worker: Worker) -> None:
        model: tuple[str, tuple[str, ...]] | None = None
        while (task := await self._next(model)) is not None:
            model = (task.line.model, task.line.loras)
            back = None
            try:
                back = await self._make(task, worker)
            finally:
                async with self._changed:
                    self._running -= 1
                    if back is not None:
                        self._waiting.appendleft(back)
                    self._changed.notify_all()

    async def _next(self, model: tuple[str, tuple[str, ...]] | None) -> Task | None:
        """The next request of ``model``, or of any; waits for what a dying worker may give back."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._waiting or self._stopped or not self._running
            )
            if self._stopped or not self._waiting:
                return None
            same = (t for t in self._waiting if (t.line.model, t.line.loras) == model)
            task = next(same, self._waiting[0])
            self._waiting.remove(task)
            self._running += 1
            return task
