"""The workers' turns: who rests when, and what is asked before anybody is there to be told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.serve.crew import Crew
from penstock.serve.hub import Hub
from penstock.serve.order import Order, Tell
from penstock.serve.queue import Queue, Row

ORDER = {"id": "a", "model": "mini", "settings": {}, "folder": "", "loras": []}


class Quiet:
    """A worker whose jobs end at once."""

    name = "quiet"

    def __init__(self) -> None:
        self.done: list[str] = []
        self.rested = asyncio.Event()

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        self.rested.clear()
        self.done.append(order.id)
        return {"state": "completed", "report": {}, "size_bytes": 1}

    async def cancel(self, name: str) -> None:
        raise AssertionError("nothing runs that could be told")

    async def rest(self) -> None:
        self.rested.set()


async def worked(path: Path, keep_alive_s: float, intent: str | None = None) -> tuple[Quiet, Row]:
    """A job that is there, or is asked to stop when it is claimed; returns when it has ended."""
    ended, worker = asyncio.Event(), Quiet()
    with Queue(path / "queue.sqlite") as queue:
        queue.add("a", ORDER, {})

        def changed(row: Row) -> None:
            if row.status == "in_progress" and row.intent is None and intent is not None:
                queue.ask("a", intent)
            if row.worker is None:
                ended.set()

        crew = Crew(queue, Hub(), [worker], keep_alive_s, changed, lambda name: path / name)
        crew.start()
        await ended.wait()
        if intent is None:
            await worker.rested.wait()
        row = queue.get("a")
        await crew.close()
    assert row is not None
    return worker, row


def test_a_worker_without_a_job_gives_everything_back(tmp_path: Path) -> None:
    worker, row = asyncio.run(worked(tmp_path, 0.01))
    assert (worker.done, row.status) == (["a"], "completed")


def test_what_is_cancelled_as_it_is_claimed_is_not_begun(tmp_path: Path) -> None:
    worker, row = asyncio.run(worked(tmp_path, 100.0, "cancel"))
    assert (worker.done, row.status) == ([], "failed")
    assert row.error is not None
    assert row.error["code"] == "cancelled"


class Small(Quiet):
    """A worker whose card holds few jobs."""

    def __init__(self, name: str, holds: set[str]) -> None:
        super().__init__()
        self.name, self._holds = name, holds

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        self.done.append(order.id)
        await asyncio.sleep(0)
        if order.id in self._holds:
            return {"state": "completed", "report": {}, "size_bytes": 1}
        return {"state": "failed", "error": {"code": "over_budget", "message": "too large"}}


async def shared(path: Path, workers: list[Small], jobs: list[str]) -> dict[str, Row]:
    """Jobs that several workers do between them; the rows when all have ended."""
    with Queue(path / "queue.sqlite") as queue:
        for job in jobs:
            queue.add(job, ORDER | {"id": job}, {})
        ended, over = set(), asyncio.Event()

        def changed(row: Row) -> None:
            if row.status in ("completed", "failed"):
                ended.add(row.id)
            if len(ended) == len(jobs):
                over.set()

        crew = Crew(queue, Hub(), workers, 100.0, changed, lambda name: path / name)
        crew.start()
        await over.wait()
        rows = {job: queue.get(job) for job in jobs}
        assert not crew._too_small, "nothing is remembered of jobs that have ended"
        await crew.close()
    return {job: row for job, row in rows.items() if row is not None}


def test_a_job_too_large_for_one_card_goes_to_another(tmp_path: Path) -> None:
    jobs = [f"job-{number}" for number in range(6)]
    large = set(jobs[::2])
    workers = [Small("small", set(jobs) - large), Small("large", set(jobs))]
    rows = asyncio.run(shared(tmp_path, workers, jobs))
    assert {row.status for row in rows.values()} == {"completed"}
    for worker in workers:
        assert len(worker.done) == len(set(worker.done)), (
            "none is tried twice where it does not fit"
        )


def test_a_job_too_large_for_every_card_fails_once_all_have_said_so(tmp_path: Path) -> None:
    workers = [Small("one", set()), Small("two", {"b"})]
    rows = asyncio.run(shared(tmp_path, workers, ["a", "b"]))
    assert (rows["a"].status, rows["b"].status) == ("failed", "completed")
    assert rows["a"].error is not None and rows["a"].error["code"] == "over_budget"
    assert "a" in workers[0].done and "a" in workers[1].done


class Empty:
    """A queue without a job; says when it is asked."""

    def __init__(self) -> None:
        self.asked = asyncio.Queue[str]()
        self._loop = asyncio.get_running_loop()

    def claim(self, worker: str, without: object) -> None:
        self._loop.call_soon_threadsafe(self.asked.put_nowait, worker)


@pytest.mark.parametrize("turns", [0, 1])
def test_news_that_come_as_the_crew_closes_keep_nobody_waiting(turns: int) -> None:
    async def closed() -> None:
        queue: Any = Empty()
        crew = Crew(queue, Hub(), [Quiet()], 100.0, lambda row: None, Path)
        crew.start()
        await queue.asked.get()
        while not crew._work._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        await crew.wake()
        for _ in range(turns):  # the slot itself has not heard of it yet
            await asyncio.sleep(0)
        closing, again = (asyncio.ensure_future(each) for each in (crew.close(), queue.asked.get()))
        await asyncio.wait({closing, again}, return_when=asyncio.FIRST_COMPLETED)
        assert closing.done() and not again.done(), "it went on, and would wait for ever"
        again.cancel()

    asyncio.run(closed())


class Telling(Quiet):
    """A worker that tells of its job, which then does not end."""

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        tell({"event": "progress", "progress": 40})
        await asyncio.Event().wait()
        raise AssertionError


def test_a_closed_crew_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed(queue: Queue) -> None:
        begun, loop, write, note = asyncio.Event(), asyncio.get_running_loop(), [], queue.note
        may = threading.Event()

        def slow(name: str, progress: int) -> None:
            loop.call_soon_threadsafe(begun.set)
            may.wait()
            note(name, progress)
            write.append(progress)

        monkeypatch.setattr(queue, "note", slow)
        crew = Crew(queue, Hub(), [Telling()], 100.0, lambda row: None, lambda name: tmp_path)
        crew.start()
        await begun.wait()
        closing = asyncio.ensure_future(crew.close())
        for _ in range(100):
            await asyncio.sleep(0)
        over = closing.done()
        may.set()
        await closing
        assert not over and write == [40]

    with Queue(tmp_path / "queue.sqlite") as queue:
        queue.add("a", ORDER, {})
        asyncio.run(closed(queue))


class Brief(Quiet):
    """A worker that tells of its job twice, and stops at once."""

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        for progress in (40, 57):
            tell({"event": "progress", "progress": progress})
        return {"state": "failed", "error": {"code": "non_finite", "message": "NaN"}}


def test_what_is_told_last_is_noted_however_soon_the_job_stops(tmp_path: Path) -> None:
    async def stopped(queue: Queue) -> int:
        ended = asyncio.Event()

        def changed(row: Row) -> None:
            if row.status == "failed":
                ended.set()

        crew = Crew(queue, Hub(), [Brief()], 100.0, changed, lambda name: tmp_path)
        crew.start()
        await ended.wait()
        await crew.close()
        row = queue.get("a")
        assert row is not None
        return row.progress

    with Queue(tmp_path / "queue.sqlite") as queue:
        queue.add("a", ORDER, {})
        assert asyncio.run(stopped(queue)) == 57
