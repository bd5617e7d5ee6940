"""Requests given out to workers: each to one at a time, and to another if that one dies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.batch.checking import order_of
from penstock.batch.folder import OutputFolder
from penstock.batch.lines import Line
from penstock.batch.results import Result
from penstock.errors import OutputError, PenstockError, StorageError, UsageError
from penstock.serve.child import Died
from penstock.serve.crew import Worker
from penstock.serve.order import COMPLETED, STOPPED, UNSEEN, error_values

MOST_DEATHS = 3
"""Workers that may die over a request until that is to blame."""

WORKER_DIED = "worker_died"
"""Code of the error of a request over which they have."""


@dataclass
class Task:
    """A request that waits, or is being made.

    Attributes:
        line: the request.
        deaths: workers that have died over it, and how the last one did.
    """

    line: Line
    deaths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Began:
    """A request is begun.

    Attributes:
        name: its own.
        worker: that makes it.
        began: as `Result.began`.
        death: how the worker died that had it before, if one had.
    """

    name: str
    worker: str
    began: str
    death: str | None


@dataclass(frozen=True)
class Told:
    """A worker tells of a request: plain values, as `penstock.serve.runner.Runner` does."""

    name: str
    worker: str
    event: Mapping[str, Any]


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
        self._running: dict[str, Worker] = {}
        self._changed = asyncio.Condition()
        self._stopped = False

    async def run(self, workers: Sequence[Worker]) -> bool:
        """Make them; returns whether all of them were tried, and not stopped.

        Raises:
            StorageError: a result cannot be noted, or a request's folder not be made.
        """
        slots = [asyncio.ensure_future(self._slot(worker)) for worker in workers]
        try:
            await asyncio.gather(*slots)
        finally:
            await self.stop()
            await asyncio.gather(*slots, return_exceptions=True)
            await asyncio.gather(*(worker.rest() for worker in workers))
        return not self._waiting

    async def stop(self) -> None:
        """Begin nothing more, and stop what runs; what is done of it is kept."""
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for name, worker in list(self._running.items()):
            await worker.cancel(name)

    async def _slot(self, worker: Worker) -> None:
        model: tuple[str, tuple[str, ...]] | None = None
        while (task := await self._next(model, worker)) is not None:
            model = (task.line.model, task.line.loras)
            back: Task | None = None
            try:
                back = await self._make(task, worker)
            finally:
                async with self._changed:
                    del self._running[task.line.name]
                    if back is not None:
                        self._waiting.appendleft(back)
                    self._changed.notify_all()

    async def _next(self, model: tuple[str, tuple[str, ...]] | None, worker: Worker) -> Task | None:
        """Return the next request of ``model``, or of any; wait for what a dying worker may give
        back."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._waiting or self._stopped or not self._running
            )
            if self._stopped or not self._waiting:
                return None
            same = (t for t in self._waiting if (t.line.model, t.line.loras) == model)
            task = next(same, self._waiting[0])
            self._waiting.remove(task)
            self._running[task.line.name] = worker
            return task

    async def _make(self, task: Task, worker: Worker) -> Task | None:
        """Make a request; returns it where it is to be taken up again."""
        line, name = task.line, worker.name
        began = _Beginning(self._folder.step_of(line))
        try:
            order = await asyncio.to_thread(order_of, line, self._folder.place_of(line))
        except (PenstockError, OSError) as error:
            self._failed(line, str(began), name, error)
            return None
        self._tell(Began(line.name, name, str(began), task.deaths[-1] if task.deaths else None))

        def tell(event: Mapping[str, Any]) -> None:
            began.hear(event)
            self._tell(Told(line.name, name, event))

        try:
            ended = await worker.run(order, tell)
        except Died as error:
            return self._died(Task(line, (*task.deaths, f"{name} {error}")), name)
        if ended["state"] == STOPPED:
            return task
        if ended["state"] != COMPLETED:
            self._noted(line, str(began), name, ended["error"])
            return None
        try:
            made = self._folder.completed(line, str(began), name, ended["report"])
        except OutputError as error:
            self._failed(line, str(began), name, error)
        else:
            self._tell(made)
        return None

    def _died(self, task: Task, worker: str) -> Task | None:
        if len(task.deaths) < MOST_DEATHS:
            return task
        told = f"{len(task.deaths)} workers died over this request; the last, {task.deaths[-1]}"
        self._noted(task.line, "anew", worker, {"code": WORKER_DIED, "message": told})
        return None

    def _failed(self, line: Line, began: str, worker: str, error: PenstockError | OSError) -> None:
        if isinstance(error, StorageError):
            raise error
        known = error if isinstance(error, PenstockError) else UsageError(
            "a file cannot be read", found=str(error)
        )  # fmt: skip
        self._noted(line, began, worker, error_values(known))

    def _noted(self, line: Line, began: str, worker: str, error: Mapping[str, Any]) -> None:
        result = Result(
            line.name, line.number, line.digest, "failed", None, began, worker, None, error
        )
        self._folder.results.add(result)
        self._tell(result)


class _Beginning:
    """Where a worker begins a request: what is kept of it, unless the worker sees none of that.

    Args:
        step: the last one that is kept; None: nothing is.
    """

    def __init__(self, step: int | None) -> None:
        self._step = step

    def hear(self, event: Mapping[str, Any]) -> None:
        """Note that a worker does not see the request's folder."""
        if event.get(UNSEEN):
            self._step = None

    def __str__(self) -> str:
        return "anew" if self._step is None else f"at step {self._step}"
