"""Several workers on one queue: what one that dies had is another's at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.profiles.options import Options
from penstock.serve import crew as crews
from penstock.serve.child import Child, Died
from penstock.serve.crew import Crew, ProcessWorker
from penstock.serve.hub import Hub
from penstock.serve.order import STOPPED, UNSEEN, Order, Tell
from penstock.serve.queue import Queue

NAME = f"video_{'0' * 24}"


class Fake:
    """A worker that makes nothing: of several, the one that has the first job dies.

    Args:
        name: for people.
        ran: names of the workers that were given a job, in order.
        unseen: it does not see the job's folder.
    """

    def __init__(self, name: str, ran: list[str], unseen: bool) -> None:
        self.name, self._ran, self._unseen = name, ran, unseen
        self._cancelled = asyncio.Event()

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        self._ran.append(self.name)
        if self._unseen:
            tell({"event": "notice", "message": "far away", UNSEEN: True})
        if len(self._ran) == 1:
            raise Died("was ended by signal 9")
        await self._cancelled.wait()
        return {"state": STOPPED}

    async def cancel(self, name: str) -> None:
        self._cancelled.set()

    async def rest(self) -> None:
        """Nothing is held."""


async def crewed(folder: Path, unseen: bool) -> tuple[list[str], str]:
    """A job whose first worker dies, and whose second is told to stop; returns which these were,
    and what was told of the death."""
    queue, hub, ran = Queue(folder / "queue.sqlite"), Hub(), []  # type: ignore[var-annotated]
    settings = {"prompt": "p", "size": "32x32", "frames": 1, "fps": 8}
    order = Order(NAME, "m", settings, "").to_json() | {"lora_names": [], "continues": None}
    workers, told = [Fake(name, ran, unseen) for name in ("a", "b")], ""
    with hub.subscribed() as events:
        queue.add(NAME, order, {"seconds": 1.0})
        crew = Crew(queue, hub, workers, 3600.0, lambda row: None, lambda name: folder / name)
        crew.start()
        async for event in events:
            told = event.data.get("message", "")
            if "its worker" in told:
                break
        while len(ran) < 2:
            await asyncio.sleep(0.01)
        queue.ask(NAME, "cancel")
        await crew.stop(NAME)
        while queue.get(NAME).status != "failed":  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
        await crew.close()
    queue.close()
    return ran, told


@pytest.mark.parametrize("unseen", [False, True])
def test_an_idle_worker_takes_what_a_dead_one_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: bool
) -> None:
    monkeypatch.setattr(crews, "_AGAIN_S", 3600.0)  # the dead one does not come back for it
    (dead, other), told = asyncio.run(crewed(tmp_path, unseen))
    assert {dead, other} == {"a", "b"}
    goes = "is begun again" if unseen else "goes on from its last step"
    assert told == f"its worker ({dead}) was ended by signal 9; it {goes}"


class FakeChild:
    """A worker's process that stops every job at once."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, Any]] = []

    async def send(self, message: Mapping[str, Any]) -> None:
        self.sent.append(message)

    async def receive(self) -> Mapping[str, Any]:
        return {"state": STOPPED}

    async def stop(self) -> None:
        """Nothing is held."""


def test_a_job_that_was_cancelled_and_comes_again_is_not_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, order = FakeChild(), Order(NAME, "m", {}, "")

    async def started(*_: Any) -> FakeChild:
        return child

    monkeypatch.setattr(Child, "start", started)

    async def play() -> list[bool]:
        worker = ProcessWorker({}, Options())
        await worker.cancel(NAME)  # while its process is being started
        cancelled = []
        for _ in range(2):
            child.sent.clear()
            await worker.run(order, lambda message: None)
            cancelled.append({"cancel": NAME} in child.sent)
        return cancelled

    assert asyncio.run(play()) == [True, False]
