"""The workers and what they do: each claims a job, does it, and claims the next.

What a worker is does not matter here: a process on this machine (`ProcessWorker`), or anything else
that runs an order and can be told to stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from penstock.errors import OverBudget, StorageError
from penstock.profiles.options import Options
from penstock.serve.child import Child, Died
from penstock.serve.hub import Hub
from penstock.serve.order import COMPLETED, STOPPED, UNSEEN, Order, Tell
from penstock.serve.queue import RUNNING, Queue, Row
from penstock.serve.threads import to_its_end

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)

NOTE_S = 1.0
"""Between two notes of a job's progress in the queue, which each wait for the disk."""

_AGAIN_S = 1.0
"""Before a worker is started again that did not even begin: nothing else would slow that down."""


class Worker(Protocol):
    """Does jobs, one at a time.

    Attributes:
        name: for people.
    """

    name: str

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        """Do one; returns what `penstock.serve.runner.Runner.run` does.

        Raises:
            Died: the worker has; the job goes on when it is run again.
        """

    async def cancel(self, name: str) -> None:
        """Let the job of that id stop where it is."""

    async def rest(self) -> None:
        """Give everything back; the next job starts it again."""


class ProcessWorker:
    """A process on this machine, which is started by its first job.

    Args:
        models, options, cache: as `penstock.serve.runner.Runner`.
        env: variables that the process has besides this one's.
        name: for people.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        options: Options,
        cache: Path | None = None,
        *,
        env: Mapping[str, str] | None = None,
        name: str = "worker",
    ) -> None:
        self.name, self._env = name, dict(env or {})
        self._config = {
            "models": dict(models),
            "options": options.to_json(),
            "cache": None if cache is None else str(cache),
        }
        self._child: Child | None = None
        self._cancelled: str | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._child is None else self._child.process.pid

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        """As `Worker`."""
        if self._child is None:
            self._child = await Child.start("penstock.serve.worker", self._config, self._env)
        try:
            await self._child.send({"run": order.to_json()})
            if self._cancelled == order.id:  # while the process was being started
                await self._child.send({"cancel": order.id})
            while True:
                message = await self._child.receive()
                if "state" in message:
                    return message
                tell(message)
        except BaseException:  # it died, or the server ends: its answers belong to no run any more
            await self.rest()
            raise
        finally:
            self._cancelled = None  # the same job may come again

    async def cancel(self, name: str) -> None:
        """As `Worker`."""
        self._cancelled = name
        if self._child is not None:
            try:
                await self._child.send({"cancel": name})
            except Died:
                return  # `run` finds out

    async def rest(self) -> None:
        """As `Worker`: the process ends, and with it all that it held."""
        child, self._child = self._child, None
        if child is not None:
            await child.stop()


class Crew:
    """Gives a queue's jobs to workers.

    Args:
        queue: whose jobs.
        hub: hears how far they are.
        workers: each does one at a time.
        keep_alive_s: after so long without a job a worker rests.
        changed: called with the row after each change of its state.
        folder_of: a video's folder by its id.
    """

    def __init__(
        self,
        queue: Queue,
        hub: Hub,
        workers: Sequence[Worker],
        keep_alive_s: float,
        changed: Callable[[Row], None],
        folder_of: Callable[[str], Path],
    ) -> None:
        self._queue, self._hub, self._workers = queue, hub, workers
        self._keep_alive_s, self._changed, self._folder_of = keep_alive_s, changed, folder_of
        self._work = asyncio.Condition()
        self._news = 0
        self._at: dict[str, Worker] = {}
        self._too_small: dict[str, set[str]] = {}
        """Slots whose worker has not the memory for a job, by its id."""
        self._tasks: list[asyncio.Task[None]] = []
        self.crashes = 0

    def start(self) -> None:
        """Begin to work, on the running loop."""
        self._tasks = [
            asyncio.create_task(self._slot(f"worker-{index}", worker))
            for index, worker in enumerate(self._workers)
        ]
        for task in self._tasks:
            task.add_done_callback(_end_loudly)

    async def wake(self) -> None:
        """There may be something to do."""
        async with self._work:
            self._news += 1
            self._work.notify_all()

    async def stop(self, name: str) -> None:
        """Let whoever works on a job stop; what becomes of it then is in the queue."""
        if (worker := self._at.get(name)) is not None:
            await worker.cancel(name)

    async def close(self) -> None:
        """Stop all jobs as they are: the next server goes on with them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            await worker.rest()

    async def _slot(self, name: str, worker: Worker) -> None:
        while True:
            news = self._news
            refused = [job for job, slots in self._too_small.items() if name in slots]
            row = await _insisted(self._queue.claim, name, refused)
            if row is None:
                await self._idle(worker, news)
                continue
            self._at[row.id] = worker
            try:
                died = await self._do(name, worker, row)
            finally:
                del self._at[row.id]
            if died:
                await self.wake()  # another one may be idle, and does not have to be started
                await asyncio.sleep(_AGAIN_S)

    async def _idle(self, worker: Worker, news: int) -> None:
        """Wait until there may be something; after a while without, the worker rests."""
        waiting = asyncio.create_task(self._until(news))
        try:
            # Not `asyncio.wait_for`: before Python 3.12 a cancellation that comes with the news is
            # lost in it, and whoever closes the crew waits for this slot for ever.
            there, _ = await asyncio.wait({waiting}, timeout=self._keep_alive_s)
            if not there:
                await worker.rest()
            await waiting
        finally:
            waiting.cancel()

    async def _until(self, news: int) -> None:
        async with self._work:
            await self._work.wait_for(lambda: self._news != news)

    async def _do(self, slot: str, worker: Worker, row: Row) -> bool:
        """Do a job; returns whether the worker died of it."""
        self._changed(row)
        order = Order.from_json({**row.order, "folder": str(self._folder_of(row.id))})
        notes, unseen = _Notes(self._queue, row), False

        def tell(message: Mapping[str, Any]) -> None:
            nonlocal unseen
            unseen |= bool(message.get(UNSEEN))
            if message["event"] == "progress":
                self._hub.progress(row.id, message)
                notes.take(message["progress"])
            else:
                self._hub.notice(row.id, message["message"])

        try:
            # Asked to stop before anybody was there to be told
            now = self._queue.get(row.id)
            if now is not None and now.intent is not None:
                ended: Mapping[str, Any] | Died = {"state": STOPPED}
            else:
                ended = await self._run(worker, order, tell)
        finally:
            await notes.settle()
        if self._goes_to_another(slot, row.id, ended):
            self._hub.notice(row.id, f"{worker.name} has not the memory for it: another one tries")
            ended = {"state": STOPPED}  # nobody asked for that: it waits for the next
        row = await _insisted(self._noted, row.id, ended)
        self._hub.rest(row.id)
        self._changed(row)
        if row.status != RUNNING:
            self._too_small.pop(row.id, None)
        elif row.id in self._too_small:
            await self.wake()
        died = isinstance(ended, Died)
        if died and row.status == RUNNING:
            goes = "is begun again" if unseen else "goes on from its last step"
            self._hub.notice(row.id, f"its worker ({worker.name}) {ended}; it {goes}")
        return died

    def _goes_to_another(self, slot: str, name: str, ended: Mapping[str, Any] | Died) -> bool:
        """Return whether a job that does not fit its worker may fit another, as cards differ."""
        if isinstance(ended, Died) or ended.get("error", {}).get("code") != OverBudget.code:
            return False
        small = self._too_small.setdefault(name, set())
        small.add(slot)
        return len(small) < len(self._workers)

    async def _run(self, worker: Worker, order: Order, tell: Tell) -> Mapping[str, Any] | Died:
        try:
            return await worker.run(order, tell)
        except OSError as error:
            died = Died(f"could not be started ({error.strerror})")
        except Died as error:
            died = error
        log.warning("the worker of %s %s", order.id, died)
        self.crashes += 1
        return died

    def _noted(self, name: str, ended: Mapping[str, Any] | Died) -> Row:
        if isinstance(ended, Died):
            return self._queue.crashed(name, str(ended))
        if ended["state"] == COMPLETED:
            return self._queue.complete(name, ended["report"], ended["size_bytes"])
        if ended["state"] == STOPPED:
            return self._queue.stopped(name)
        return self._queue.fail(name, ended["error"])


def _end_loudly(task: asyncio.Task[None]) -> None:
    """Keep a slot until its server ends: whatever else ends it is not to be waited for in vain."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a worker's slot has ended", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def _insisted(change: Callable[..., _Result], *arguments: Any) -> _Result:
    """Return what a change of the queue gives, once the disk takes it: nothing else can be done
    before."""
    while True:
        try:
            return await to_its_end(change, *arguments)
        except StorageError as error:
            log.error("the queue: %s", error)
            await asyncio.sleep(_AGAIN_S)


class _Notes:
    """Writes a job's progress into the queue beside the loop, the last one first to go."""

    def __init__(self, queue: Queue, row: Row) -> None:
        self._queue, self._name, self._noted = queue, row.id, row.progress
        self._wanted = row.progress
        self._task: asyncio.Task[None] | None = None

    def take(self, progress: int) -> None:
        """Note how far the job is."""
        self._wanted = max(self._wanted, progress)
        if self._wanted > self._noted and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        self._noted = self._wanted
        await to_its_end(self._queue.note, self._name, self._noted)
        await asyncio.sleep(NOTE_S)

    async def settle(self) -> None:
        """Note the last of it; nothing is being written any more then."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._wanted > self._noted:  # since the last note: who looks sees it go back otherwise
            try:
                await to_its_end(self._queue.note, self._name, self._wanted)
            except StorageError as error:
                log.error("the queue: %s", error)
