"""The end of a server: who waits is told, what is half done is left to the next, nobody stays."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from penstock.batch.run import _dispatched
from penstock.errors import StorageError
from penstock.profiles.options import Options
from penstock.serve.child import Child, Died
from penstock.serve.cluster import RayWorker
from penstock.serve.fields import VideoFields
from penstock.serve.queue import Row
from penstock.serve.service import NotFound, NotNow, PlanDesk, Service, TooMuch
from penstock.serve.settings import Limits, ServeSettings
from penstock.serve.workers import Models
from tests.serve.inside import Inside, Scripted

NAME = f"video_{0:024x}"
PLANNED = {"plan": {"fits": True}, "settings": {"prompt": "a cat"}}


def settings_in(folder: Path) -> ServeSettings:
    return ServeSettings({"mini": "nowhere"}, Options(), folder, limits=Limits(waiting=4))


@pytest.fixture(autouse=True)
def no_planner(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    async def answer(desk: PlanDesk, what: str, **with_: Any) -> dict[str, Any]:
        return {} if what == "about" else dict(PLANNED)

    if "desk" not in request.node.name:
        monkeypatch.setattr(PlanDesk, "ask", answer)


def with_service(folder: Path, do: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
    """Do something with a service that is open, without workers."""

    async def run() -> None:
        service = Service(settings_in(folder), [])
        try:
            await service.open()
            await do(service)
        finally:
            await service.close()

    asyncio.run(run())


def test_streams_of_events_end_whole_with_the_server(tmp_path: Path) -> None:
    server, begun = Inside(tmp_path, Scripted(tmp_path)), threading.Event()
    ended = list[str]()

    def read() -> None:
        try:
            with httpx.stream("GET", f"{server.url}/v1/events", timeout=None) as answer:
                for _ in answer.iter_lines():
                    begun.set()
            ended.append("whole")
        except httpx.HTTPError as error:
            ended.append(str(error))

    reading = threading.Thread(target=read)
    reading.start()
    begun.wait()
    server.close()
    reading.join()
    assert ended == ["whole"]


def test_who_deletes_is_told_that_it_does_not_go_and_the_next_server_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty")

    async def deleted(service: Service) -> None:
        service.folder(NAME).mkdir()
        service.queue.add(NAME, {}, {})
        with pytest.raises(StorageError, match="cannot be removed"):
            await service.delete(NAME)

    async def gone(service: Service) -> None:
        assert service.queue.get(NAME) is None and not service.folder(NAME).exists()

    async def there(service: Service) -> None:
        assert service.queue.get(NAME) is not None

    (stray := tmp_path / "jobs" / f"video_{1:024x}").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with_service(tmp_path, deleted)
        with_service(tmp_path, there)
    assert stray.exists()
    with_service(tmp_path, gone)
    assert not stray.exists()


def test_no_more_wait_than_may_however_many_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = settings_in(tmp_path).limits.waiting

    async def crowded(service: Service) -> None:
        monkeypatch.setattr(service, "_changed", lambda row: None)  # nobody looks at its plan
        asked = (service.create(VideoFields(prompt="a cat")) for _ in range(most + 3))
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in found if not isinstance(each, Row)] == [TooMuch] * 3
        assert len(service.queue.waiting()) == len(list((tmp_path / "jobs").iterdir())) == most

    with_service(tmp_path, crowded)


@pytest.mark.parametrize("what", ["delete", "cancel", "resume", "move"])
def test_a_video_that_is_gone_meanwhile_is_not_found(tmp_path: Path, what: str) -> None:
    async def asked(service: Service) -> None:
        row = service.queue.add(NAME, {}, {})
        service.queue.remove(NAME)
        service.row = lambda name: row  # type: ignore[method-assign]  # as it was a moment ago
        with pytest.raises(NotFound):
            if what == "delete":
                await service.delete(NAME)
            elif what == "move":
                await service.move(NAME, 0)
            else:
                await service.change(NAME, what)

    with_service(tmp_path, asked)


def test_what_is_put_into_the_queue_as_its_client_is_cut_off_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(service: Service) -> None:
        loop, begun, may, add = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), (
            service._add
        )  # fmt: skip

        def slow(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(begun.set)
            may.wait()
            return add(*arguments)

        monkeypatch.setattr(service, "_add", slow)
        asking = asyncio.ensure_future(service.create(VideoFields(prompt="a cat")))
        await begun.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        may.set()

    with_service(tmp_path, cut_off)
    (folder,) = (tmp_path / "jobs").iterdir()
    assert folder.is_dir()


def test_a_closed_desk_starts_no_other_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        started = 0

        def __init__(self) -> None:
            Silent.started += 1
            self._ended = asyncio.Event()

        @classmethod
        async def start(cls, module: str, config: object) -> Silent:
            return cls()

        async def send(self, message: object) -> None:
            return

        async def receive(self) -> None:
            await self._ended.wait()
            raise Died("was ended by signal 9")

        async def stop(self) -> None:
            self._ended.set()

    async def asked() -> None:
        desk = PlanDesk(settings_in(tmp_path))
        asking = [asyncio.ensure_future(desk.ask("about")) for _ in range(2)]
        while desk._child is None:
            await asyncio.sleep(0)
        await desk.close()
        told = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(each) for each in told] == [NotNow, NotNow]

    monkeypatch.setattr(Child, "start", Silent.start)
    asyncio.run(asked())
    assert Silent.started == 1


@pytest.mark.parametrize("turns", range(4))
def test_an_actor_that_has_its_place_as_the_server_ends_begins_no_job(turns: int) -> None:
    async def placed() -> None:
        answer = asyncio.get_running_loop().create_future()
        worker = RayWorker(None, "ray", Models({}, Options()), 0, None)
        worker._actor = SimpleNamespace(here=SimpleNamespace(remote=lambda: answer))
        task = asyncio.ensure_future(worker._placed())
        for _ in range(5):
            await asyncio.sleep(0)
        answer.set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()

    asyncio.run(placed())


def test_a_signal_that_comes_when_the_list_is_made_is_no_error() -> None:
    class Made:
        async def run(self, workers: object) -> bool:
            return True

    stops = list[Callable[[], None]]()
    made: Any = Made()
    asyncio.run(_dispatched(made, [], stops.append))
    stops[0]()
