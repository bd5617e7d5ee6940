"""The workers' turns: who rests when, and what is asked before anybody is there to be told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
