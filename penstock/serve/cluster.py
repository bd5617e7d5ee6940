"""Workers as actors of a Ray cluster: one an accelerator, on this machine or on many.

Ray is imported here alone, and only where it is asked for (the extra ``ray``). It places the
actors; what they do is `penstock.serve.runner.Runner`'s.

Where an actor's machine sees the job's folder (storage that both share) the journal there is its
own, and a job whose actor died goes on from its last step. Elsewhere the job's files travel to it
and the video back, and a job whose actor died is begun again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.engine.store.durable import FileOps, write_atomically
from penstock.errors import UsageError
from penstock.profiles.options import Options
from penstock.serve.child import Died
from penstock.serve.crew import Worker
from penstock.serve.order import COMPLETED, FILES, UNSEEN, VIDEO, Order, Tell
from penstock.serve.workers import Models, threads_each

LOCAL, AUTOMATIC = "local", "auto"

_STORE_BYTES = 100 << 20
"""Of Ray's object store on this machine: a video and a picture pass through it at most."""

_LISTENS_S = 10.0
"""How long a cluster's head may take to answer a connection."""

_PLACED_S = 300.0
"""How long a cluster may take to find a place for an actor, and to start it there."""

_NEWS_S = 1.0
"""How long an actor waits for something to tell before it says that there is nothing."""

_NICE = "5"
"""Of actors on this machine, as of `penstock.serve.worker`; Ray's own, 15, starves them where
anything else computes."""

_CALLS = 4
"""Calls that an actor answers at a time: a job runs, its news are asked for, it is cancelled."""


class Hand:
    """What an actor is: a Runner, and the news of what it does. Its methods run on threads.

    Args:
        places, options, cache: as `penstock.serve.runner.Runner`.
        threads: that it may compute with; None: torch's own choice.
    """

    def __init__(
        self, places: Mapping[str, str], options: Mapping[str, Any], cache: str | None,
        threads: int | None,
    ) -> None:  # fmt: skip
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        from penstock.serve.runner import Runner

        self._runner = Runner(places, Options.from_json(options), _path(cache))
        self._changed = threading.Condition()
        self._news: list[Mapping[str, Any]] = []
        self._ended = False

    def here(self) -> bool:
        """Yes: the actor has its place."""
        return True

    def sees(self, marker: str, token: str) -> bool:
        """Return whether a file that was just written elsewhere is here as well."""
        try:
            return Path(marker).read_text(encoding="ascii") == token
        except (OSError, UnicodeDecodeError):
            return False

    def begin(self) -> None:
        """Forget the last job's news."""
        with self._changed:
            self._news, self._ended = [], False

    def run(
        self, order: Mapping[str, Any], files: Mapping[str, bytes] | None
    ) -> tuple[dict[str, Any], bytes | None]:
        """Do a job; returns how it ended, and the video where the job's folder is not seen here.

        Args:
            order: plain values.
            files: of its folder, where that is not seen here.
        """
        asked = Order.from_json(order)
        try:
            if files is None:
                return self._runner.run(asked, self._tell), None
            with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
                for name, data in files.items():
                    (Path(folder) / name).write_bytes(data)
                here = replace(asked, folder=folder)
                outcome = self._runner.run(here, self._tell)
                done = outcome["state"] == COMPLETED
                return outcome, here.video.read_bytes() if done else None
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _tell(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            self._news.append(dict(message))
            self._changed.notify_all()

    def news(self) -> tuple[list[Mapping[str, Any]], bool]:
        """Return what was told since the last time, and whether that was all."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._ended, _NEWS_S)
            told, self._news = self._news, []
            return told, self._ended

    def cancel(self, name: str) -> None:
        """Stop the job of that id."""
        self._runner.cancel(name)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class RayWorker:
    """A `penstock.serve.crew.Worker` on an actor, which its first job makes.

    Args:
        ray: the module.
        name: for people.
        models: what it knows; places are those on its machine.
        gpus: that it takes: 1, or 0 on a machine without.
        threads: as of `Hand`.
    """

    def __init__(self, ray: Any, name: str, models: Models, gpus: int, threads: int | None) -> None:
        self._ray, self.name, self._models = ray, name, models
        self._gpus, self._threads = gpus, threads
        self._actor: Any = None
        self._cancelled: str | None = None

    def _made(self) -> Any:
        models = self._models
        kind = self._ray.remote(Hand).options(
            num_gpus=self._gpus, num_cpus=0 if self._gpus else 1, max_concurrency=_CALLS
        )
        cache = None if models.cache is None else str(models.cache)
        return kind.remote(dict(models.places), models.options.to_json(), cache, self._threads)

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        """As `Worker`; a notice says where the job's folder is not seen."""
        try:
            return await self._run(order, tell)
        except self._ray.exceptions.RayError as error:
            await self.rest()
            raise Died(f"was lost ({str(error).splitlines()[0]})") from error
        except BaseException:
            await self.rest()
            raise
        finally:
            self._cancelled = None  # the same job may come again

    async def _run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        if self._actor is None:
            self._actor = self._made()
            await self._placed()
        actor, folder = self._actor, Path(order.folder)
        shares = await self._shares(actor, folder)
        files = None if shares else _files_in(folder)
        if not shares:
            told = "this worker does not see the job's folder: if it dies, the job is begun again"
            tell({"event": "notice", "message": told, UNSEEN: True})
        await actor.begin.remote()
        running = actor.run.remote(order.to_json(), files)
        if self._cancelled == order.id:
            actor.cancel.remote(order.id)
        ended = False
        while not ended:
            told_now, ended = await actor.news.remote()
            for message in told_now:
                tell(message)
        outcome, video = await running
        if video is not None:
            write_atomically(FileOps(), folder / VIDEO, [video])
        return dict(outcome)

    async def _placed(self) -> None:
        answer = asyncio.ensure_future(_answer(self._actor.here.remote()))
        try:
            there, _ = await asyncio.wait({answer}, timeout=_PLACED_S)
            if not there:
                raise Died("has found no place in the cluster")
            await answer
        finally:
            answer.cancel()

    async def _shares(self, actor: Any, folder: Path) -> bool:
        marker, token = folder / f"seen-{secrets.token_hex(6)}", secrets.token_hex(16)
        marker.write_text(token, encoding="ascii")
        try:
            return bool(await actor.sees.remote(str(marker), token))
        finally:
            marker.unlink(missing_ok=True)

    async def cancel(self, name: str) -> None:
        """As `Worker`."""
        self._cancelled = name
        if self._actor is not None:
            self._actor.cancel.remote(name)

    async def rest(self) -> None:
        """As `Worker`: the actor ends, and its accelerator is free for others."""
        actor, self._actor = self._actor, None
        if actor is not None:
            await asyncio.to_thread(self._ray.kill, actor)


async def _answer(reference: Any) -> Any:
    return await reference


def _files_in(folder: Path) -> dict[str, bytes]:
    paths = {name: folder / name for name in FILES.values()}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def connected(address: str) -> Any:
    """Ray, imported and connected.

    Args:
        address: of a cluster, "local" for one of this process's own, or "auto" for the one that
            this machine belongs to, else one of its own.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "Ray is not installed", remedy='Install it: pip install "penstock[ray]"'
        ) from error
    if address == LOCAL:
        _begin(ray)
        return ray
    if address != AUTOMATIC:
        _check_listens(address)
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        if address != AUTOMATIC:
            raise UsageError("no Ray cluster there", found=f"{address}: {error}") from error
        _begin(ray)
    return ray


def _check_listens(address: str) -> None:
    """Ray itself looks for minutes."""
    host, colon, port = address.rpartition(":")
    expected = 'local, auto, or its head as "HOST:6379"'
    if not colon or not port.isdecimal() or "/" in host:
        raise UsageError("no address of a Ray cluster", expected=expected, found=address)
    try:
        socket.create_connection((host, int(port)), _LISTENS_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            "no Ray cluster there", expected=expected, found=f"{address}: {error}"
        ) from error


def _begin(ray: Any) -> None:
    os.environ.setdefault("RAY_worker_niceness", _NICE)
    try:
        ray.init(
            address=LOCAL,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
        )
    except RuntimeError as error:
        raise UsageError("Ray does not start here", found=str(error)) from error


def on_ray(ray: Any, models: Models, cpus: int | None = None) -> list[Worker]:
    """Return an actor an accelerator of the cluster; Ray finds each a place.

    Args:
        ray: connected.
        models: what they know.
        cpus: without accelerators: how many actors compute on CPUs; None: one.

    Raises:
        UsageError: CPUs were asked for, and there are accelerators.
    """
    gpus = gpus_of(ray)
    count = sum(gpus) if cpus is None else cpus
    on_cpu = cpus is not None or count == 0
    count = max(1, count)
    threads = threads_each(count) if on_cpu and count > 1 else None
    return [
        RayWorker(ray, f"ray {place + 1}", models, 0 if on_cpu else 1, threads)
        for place in range(count)
    ]


def gpus_of(ray: Any) -> Sequence[int]:
    """Return the accelerators of each machine of the cluster."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
