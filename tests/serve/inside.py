"""A server in this process, on a thread, whose worker does what the test says."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from penstock.engine.request.demo import MINI, demo_picture
from penstock.profiles.options import Options
from penstock.serve.child import Died
from penstock.serve.launch import bound, server_of
from penstock.serve.order import Order, Tell
from penstock.serve.service import Service
from penstock.serve.settings import ServeSettings
from tests.serve.running import SMALL

PREVIEW = "/9j/4AAQ"  # the first bytes of a JPEG, in base64


class Scripted:
    """A worker that tells of a step, and then waits to be told how its job ends.

    Attributes:
        begun: the ids that it was given, once each.
        rests: how often it was to give everything back.
        video: what it makes.
    """

    name = "scripted"

    def __init__(self, video: Path) -> None:
        self.video = video
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.rests = 0
        self._ends: asyncio.Queue[Mapping[str, Any] | Died] = asyncio.Queue()
        self._doing: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        self._loop, self._doing = asyncio.get_running_loop(), order.id
        tell({"event": "notice", "message": "begun"})
        tell(
            {
                "event": "progress", "phase": "denoise", "step": 1, "total": 2, "unit": "step",
                "progress": 40, "eta_s": 3.0, "vram_bytes": 5, "ram_bytes": 6, "preview": PREVIEW,
            }
        )  # fmt: skip
        self.begun.put(order.id)
        try:
            end = await self._ends.get()
        finally:
            self._doing = None
        if isinstance(end, Died):
            raise end
        if end["state"] == "completed":
            order.video.write_bytes(self.video.read_bytes())
        return end

    async def cancel(self, name: str) -> None:
        if self._doing == name:  # else it has not been given that one, and another one would stop
            self._doing = None  # once, however often it is told
            await self._ends.put({"state": "stopped"})

    async def rest(self) -> None:
        self.rests += 1

    def has_begun(self, name: str) -> None:
        """Wait until that one is (again) where this worker waits."""
        while self.begun.get() != name:
            pass

    def end(self, how: Mapping[str, Any] | Died) -> None:
        """Let the job that runs end so; called on the test's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ends.put_nowait, how)

    def complete(self) -> None:
        """Let it end well."""
        size = self.video.stat().st_size
        self.end({"state": "completed", "report": {"seconds": 1.0}, "size_bytes": size})


class Inside:
    """Runs until `close`.

    Args:
        folder: its own.
        worker: does its jobs.
        said: other settings than the defaults.
    """

    def __init__(self, folder: Path, worker: Scripted, **said: Any) -> None:
        options = Options(vram="64MiB", ram="128MiB", device="cpu")
        settings = {
            "models": {"mini": str(MINI)},
            "options": options,
            "folder": folder,
            "port": 0,
        } | said
        self.worker, self.folder = worker, folder
        self.settings = ServeSettings(**settings)
        self._ready, self._failed = threading.Event(), list[BaseException]()
        self._thread = threading.Thread(target=self._run, name="a server")
        self._thread.start()
        self._ready.wait()
        if self._failed:
            raise self._failed[0]
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=None)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised on the test's thread
            self._failed.append(error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        with bound(self.settings) as listener:
            self.address: tuple[str, int] = listener.getsockname()[:2]
            self.service = Service(self.settings, [self.worker])
            try:
                await self.service.open()
                self._server = server_of(self.service)
                self._ready.set()
                await self._server.serve(sockets=[listener])
            finally:
                await self.service.close()

    def close(self) -> None:
        """End it; what went wrong in it is raised."""
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def post(self, **more: Any) -> httpx.Response:
        """Ask for a video of `SMALL` with other fields; one of None is left out."""
        said = {**SMALL, **more}
        files = {"input_reference": ("a.png", demo_picture().read_bytes(), "image/png")}
        data = {name: value for name, value in said.items() if value is not None}
        return self.client.post("/v1/videos", data=data, files=files)

    def create(self, **more: Any) -> str:
        """Likewise; returns the id."""
        answer = self.post(**more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def get(self, name: str) -> dict[str, Any]:
        """A video as it is now."""
        answer = self.client.get(f"/v1/videos/{name}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def do(self, name: str, what: str, **query: Any) -> httpx.Response:
        """Pause, cancel, resume or move a video."""
        return self.client.post(f"/v1/videos/{name}/{what}", params=query)

    def until(self, name: str, **wanted: Any) -> dict[str, Any]:
        """A video, once its fields are so: each event brings the next look."""
        with self.client.stream("GET", "/v1/events") as answer:
            for _ in answer.iter_lines():
                now = self.get(name)
                if all(now[key] == value for key, value in wanted.items()):
                    return now
        raise AssertionError(f"{name} did not become {wanted}")

    def empty(self) -> None:
        """Remove all videos."""
        for row in self.client.get("/v1/videos", params={"limit": 100}).json()["data"]:
            self.client.delete(f"/v1/videos/{row['id']}")
