"""What the server does, without HTTP: videos are asked for, planned, queued, done and removed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.engine.store.lock import JobLock
from penstock.errors import PenstockError, RequestError, StorageError, UsageError
from penstock.serve.child import Child, Died
from penstock.serve.crew import Crew, Worker
from penstock.serve.fields import PlanFields, VideoFields
from penstock.serve.hub import Event, Hub
from penstock.serve.order import BEFORE, IMAGE, LAST_IMAGE, VIDEO, Order
from penstock.serve.pictures import keep, picture_bytes
from penstock.serve.queue import COMPLETED, FAILED, Queue, Row
from penstock.serve.settings import ServeSettings
from penstock.serve.videos import video

log = logging.getLogger(__name__)

MOST_PLANS = 512
"""Answers of the planner that are kept: who types asks the same again."""

_ID = re.compile(r"video_[0-9a-f]{24}")


class NotFound(PenstockError):
    """There is no such thing here: a video, a model, a LoRA, a part of a video."""

    code = "not_found"


class NotNow(PenstockError):
    """The thing is there, and not in the state that is needed."""

    code = "conflict"


class TooMuch(PenstockError):
    """A quota is used up."""

    code = "quota_exceeded"


class DoesNotFit(PenstockError):
    """No plan fits the budgets.

    Args:
        plan: of the planner, with the arithmetic and the nearest that fits.
    """

    code = "over_budget"

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        problem = plan["problem"]
        super().__init__(
            "the video does not fit the server's budget",
            expected=problem["expected"],
            found=problem["found"],
            remedy=problem["remedy"],
        )


class Refused(PenstockError):
    """What the planning process has refused, as it told it."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.code = told["code"]
        super().__init__(told["message"])
        self.told = told


class PlanDesk:
    """The planning process, seen from the server. One question at a time is answered; a process
    that dies is started again, and its question is the asker's to lose.

    Args:
        settings: models, options and limits.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._config = {
            "models": dict(settings.models),
            "options": settings.options.to_json(),
            "pixels": settings.limits.pixels,
            "cache": None if settings.cache is None else str(settings.cache),
        }
        self._child: Child | None = None
        self._turn = asyncio.Lock()
        self._number, self._closed = 0, False

    async def ask(self, what: str, **with_: Any) -> dict[str, Any]:
        """Return the answer to a question (`penstock.serve.planner`).

        Raises:
            Refused: the planner refuses; NotNow: it died of the question, or the server ends.
        """
        async with self._turn:
            if self._closed:
                raise NotNow("the request could not be planned", found="the server ends")
            self._number += 1
            try:
                return await self._asked({"number": self._number, "ask": what, "with": with_})
            except Died as error:
                log.warning("the planner %s", error)
                await self._stop()
                raise NotNow(
                    "the request could not be planned", found=f"the planner {error}"
                ) from error
            except asyncio.CancelledError:  # its answer would be taken for the next question's
                await self._stop()
                raise

    async def _asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._child = await Child.start("penstock.serve.planner", self._config)
        await self._child.send(question)
        message = await self._child.receive()
        if "error" in message:
            raise Refused(message["error"])
        answer: dict[str, Any] = message["answer"]
        return answer

    async def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    async def close(self) -> None:
        """End the process; no other is started for those who wait for their turn."""
        self._closed = True
        await self._stop()


class Service:
    """Of one server; made by `opened`, and used on its loop.

    Attributes:
        settings: that it was started with.
        queue, hub: what its routes read.
        about: what the planner says of each model.
        connections: that are open.
    """

    def __init__(self, settings: ServeSettings, workers: Sequence[Worker]) -> None:
        self.settings, self.hub = settings, Hub()
        self._jobs = settings.folder / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._lock = JobLock(settings.folder / "lock")
        self.queue = Queue(settings.folder / "queue.sqlite")
        self._planner = PlanDesk(settings)
        self._plans: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._workers = workers
        self.about: dict[str, Any] = {}
        self.connections: set[object] = set()
        self._crew: Crew | None = None
        self._gone: dict[str, asyncio.Future[None]] = {}
        self._removals: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Look at the models, take up what the last server left, and begin to work.

        Raises:
            Refused: a model cannot be opened.
        """
        self.about = await self._planner.ask("about")
        for row in await asyncio.to_thread(self.queue.recover):
            await self._remove(row.id)
        await asyncio.to_thread(self._sweep)
        self._crew = Crew(
            self.queue,
            self.hub,
            self._workers,
            self.settings.keep_alive_s,
            self._changed,
            self.folder,
        )
        self._crew.start()

    @property
    def crew(self) -> Crew:
        """The workers, once the service is open."""
        assert self._crew is not None
        return self._crew

    async def close(self) -> None:
        """Stop everything as it is; the next server goes on from there."""
        self.hub.close()
        if self._crew is not None:
            await self._crew.close()
        await self._planner.close()
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        self.queue.close()
        self._lock.release()

    def _sweep(self) -> None:
        """Remove the folders of requests that were never answered, or of videos that are gone."""
        for folder in self._jobs.iterdir():
            if _ID.fullmatch(folder.name) and self.queue.get(folder.name) is None:
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    log.error("%s is nobody's, and cannot be removed: %s", folder, error)

    def folder(self, name: str) -> Path:
        """Return where a video is kept: its id is the server's own."""
        return self._jobs / name

    # What clients ask

    def row(self, name: str) -> Row:
        """Return a video that is there.

        Raises:
            NotFound: it is not, or is about to be gone.
        """
        row = self.queue.get(name) if _ID.fullmatch(name) else None
        if row is None or row.intent == "delete":
            raise _no_such(name)
        return row

    def shown(self, row: Row) -> dict[str, Any]:
        """Return a video as clients see it."""
        return video(row, self.hub.live(row.id), self.queue.waiting() if row.waits else ())

    def shown_all(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the videos likewise."""
        waiting = self.queue.waiting()
        return [video(row, self.hub.live(row.id), waiting) for row in rows]

    def queue_shown(self) -> dict[str, Any]:
        """Return the queue as clients see it."""
        return {
            "object": "queue",
            "paused": self.queue.paused,
            "running": list(self.queue.running()),
            "waiting": list(self.queue.waiting()),
        }

    async def plan(self, asked: PlanFields, *, others: bool = False) -> dict[str, Any]:
        """Return what a request would take; no picture is needed for that.

        Raises:
            PenstockError: it is illegal.
        """
        question = self._question(asked, others=others)
        key = repr(sorted((name, str(value)) for name, value in question.items()))
        if key not in self._plans:
            self._plans[key] = await self._planner.ask("plan", **question)
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        found = self._plans[key]
        settings = dict(found["settings"])
        return {
            "object": "plan",
            "model": question["model"],
            **found["plan"],
            "video_seconds": f"{settings['frames'] / settings['fps']:.6g}",
            "settings": settings,
        }

    async def create(self, asked: VideoFields) -> Row:
        """Plan a video, and put it into the queue.

        Raises:
            DoesNotFit: with the arithmetic; TooMuch: a quota; PenstockError: it is illegal.
        """
        self._check_quotas()
        name = f"video_{secrets.token_hex(12)}"
        folder = self.folder(name)
        with self._begun(folder):
            continues = await self._gather(asked, folder)
            question = self._question(asked, folder=folder)
            found = await self._planner.ask("plan", **question)
            if not found["plan"]["fits"]:
                raise DoesNotFit(found["plan"])
            order = Order(
                id=name,
                model=question["model"],
                settings=found["settings"],
                folder="",
                loras=tuple(question["loras"]),
                cache=question["cache"],
                preview_every=asked.preview_every or 1,
            ).to_json()
            order["lora_names"] = [[use.name, use.scale] for use in asked.uses]
            order["continues"] = continues
            row = await asyncio.to_thread(self._add, name, order, found["plan"])
        self._changed(row)
        await self.crew.wake()
        return row

    def _add(self, name: str, order: Mapping[str, Any], plan: Mapping[str, Any]) -> Row:
        for folder in (self.folder(name), self._jobs):
            _settle(folder)
        try:
            return self.queue.add(name, order, plan, self.settings.limits.waiting)
        except UsageError as error:  # others were added while this one was planned
            raise _too_much(error) from error

    @contextmanager
    def _begun(self, folder: Path) -> Iterator[None]:
        """Provide a folder that is gone again where the request comes to nothing.

        Of one that is cut off by the server's end nothing is removed here: a thread may be writing
        to it, or just have put it into the queue. The next server sees what became of it.
        """
        try:
            folder.mkdir()
        except OSError as error:
            raise StorageError(
                "the server cannot store the request", found=error.strerror
            ) from error
        try:
            yield
        except Exception:
            shutil.rmtree(folder)
            raise

    async def _gather(self, asked: VideoFields, folder: Path) -> str | None:
        """Put a request's files into its folder; returns what it goes on from."""
        first = asked.input_reference or asked.image_reference or asked.reference_url
        limits = self.settings.limits
        for name, field, value in (
            (IMAGE, "input_reference", first),
            (LAST_IMAGE, "last_image", asked.last_image),
        ):
            if value is not None and value != "":
                data = await picture_bytes(
                    value,
                    field,
                    allow_urls=self.settings.allow_urls,
                    most_bytes=limits.body_bytes,
                )
                await asyncio.to_thread(_kept, folder / name, data)
        if asked.continue_from is None:
            return None
        if first:
            raise RequestError(
                "input_reference and continue_from cannot be used together",
                expected="input_reference or continue_from",
                found="both",
            )
        before = self.finished(asked.continue_from)
        await asyncio.to_thread(_linked, before, folder / BEFORE)
        return asked.continue_from

    def _question(
        self, asked: PlanFields, *, folder: Path | None = None, others: bool = False
    ) -> dict[str, Any]:
        model = asked.model or self.settings.default_model
        if model not in self.settings.models:
            raise NotFound(
                "no such model", expected=", ".join(self.settings.models), found=model[:80]
            )
        settings = asked.settings
        if not settings["prompt"].strip() and folder is None:
            settings["prompt"] = "-"  # a plan does not depend on it
        if folder is not None:
            there = {"image": IMAGE, "last_image": LAST_IMAGE, "after": BEFORE}
            settings |= {key: True for key, file in there.items() if (folder / file).exists()}
        return {
            "model": model,
            "settings": settings,
            "seconds": asked.seconds,
            "loras": self._lora_places(asked),
            "cache": asked.cache,
            "folder": None if folder is None else str(folder),
            "whole": folder is not None,
            "others": others,
        }

    def _check_quotas(self) -> None:
        limits = self.settings.limits
        try:
            self.queue.check_room(limits.waiting)
        except UsageError as error:
            raise _too_much(error) from error
        if limits.kept_bytes is not None and self.queue.kept_bytes() >= limits.kept_bytes:
            raise TooMuch(
                "the server keeps too much",
                expected=f"less than {limits.kept_bytes:,} bytes of videos",
                found=f"{self.queue.kept_bytes():,}",
                remedy="Delete some.",
            )

    def loras(self) -> dict[str, Path]:
        """Return the LoRAs that clients may name."""
        found: dict[str, Path] = {}
        for folder in self.settings.lora_folders:
            for path in sorted(folder.rglob("*.safetensors")):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        return found

    def _lora_places(self, asked: PlanFields) -> list[str]:
        uses = asked.uses
        known = self.loras() if uses else {}
        for use in uses:
            if use.name.removesuffix(".safetensors") not in known:
                raise NotFound("no such LoRA", expected="a name of /v1/loras", found=use.name[:80])
        return [f"{known[use.name.removesuffix('.safetensors')]}:{use.scale}" for use in uses]

    async def change(self, name: str, intent: str) -> Row:
        """Pause, cancel or resume a video.

        Raises:
            NotFound: there is none; NotNow: its state does not allow it.
        """
        self.row(name)
        if intent == "resume":
            row = await self._asked(self.queue.resume, name)
        else:
            row = await self._asked(self.queue.ask, name, intent)
        await self.crew.stop(name) if row.intent is not None else await self.crew.wake()
        self._changed(row)
        return row

    async def move(self, name: str, position: int) -> Row:
        """Give a waiting video another place.

        Raises:
            NotFound: there is none; NotNow: it does not wait.
        """
        self.row(name)
        row = await self._asked(self.queue.move, name, position)
        self._changed(row)
        return row

    async def _asked(self, change: Callable[..., Row], name: str, *arguments: Any) -> Row:
        """Return a video's row after a change of the queue; by then it may be gone."""
        try:
            return await asyncio.to_thread(change, name, *arguments)
        except UsageError as error:
            raise NotNow(error.what, expected=error.expected, found=error.found) from error
        except KeyError as error:
            raise _no_such(name) from error

    async def pause_all(self, paused: bool) -> None:
        """Begin no further job, or begin them again."""
        await asyncio.to_thread(self.queue.pause_all, paused)
        self._queue_changed()
        await self.crew.wake()

    async def delete(self, name: str) -> None:
        """Stop a video and remove all of it; returns when it is gone.

        Raises:
            NotFound: there is none; StorageError: it cannot be removed.
        """
        self.row(name)
        gone = self._gone.setdefault(name, asyncio.get_running_loop().create_future())
        row = await self._asked(self.queue.ask, name, "delete")
        if row.worker is None:
            self._begin_removal(name)
        else:
            await self.crew.stop(name)
        await asyncio.shield(gone)

    def finished(self, name: str) -> Path:
        """Return a finished video's file.

        Raises:
            NotFound: there is no such video; NotNow: it is not finished.
        """
        row = self.row(name)
        if row.status != COMPLETED:
            raise NotNow(
                "the video is not finished", expected="completed", found=row.status,
            )  # fmt: skip
        return self.folder(name) / VIDEO

    async def frame(self, name: str, which: str, suffix: str) -> Path:
        """Return a frame of a finished video as a picture, made when it is first asked for.

        Raises:
            NotFound, NotNow: as `finished`.
        """
        path = self.finished(name)
        target = path.with_name(f"{which}{suffix}")
        if not target.exists():
            await self._planner.ask("frame", video=str(path), which=which, to=str(target))
        return target

    # What follows

    def _changed(self, row: Row) -> None:
        if row.intent == "delete":
            if row.worker is None:
                self._begin_removal(row.id)
            return
        if row.status in (COMPLETED, FAILED):
            self.hub.forget(row.id)
        self.hub.publish(Event("video", row.id, self.shown(row)))
        self._queue_changed()

    def _queue_changed(self) -> None:
        self.hub.publish(Event("queue", None, self.queue_shown()))

    def _begin_removal(self, name: str) -> None:
        if name not in self._removals:
            task = asyncio.create_task(self._remove(name))
            self._removals[name] = task
            task.add_done_callback(lambda _: self._removals.pop(name))

    async def _remove(self, name: str) -> None:
        folder = self.folder(name)
        try:
            if folder.exists():
                await asyncio.to_thread(shutil.rmtree, folder)
            await asyncio.to_thread(self.queue.remove, name)
        except (OSError, StorageError) as error:
            log.error("%s cannot be removed: %s", name, error)
            if (gone := self._gone.pop(name, None)) is not None and not gone.done():
                gone.set_exception(_not_removed(error))
            return
        self.hub.forget(name)
        self.hub.publish(Event("deleted", name, {"id": name}))
        self._queue_changed()
        if (gone := self._gone.pop(name, None)) is not None and not gone.done():
            gone.set_result(None)


def _too_much(error: UsageError) -> TooMuch:
    return TooMuch(error.what, expected=error.expected, found=error.found, remedy=error.remedy)


def _no_such(name: str) -> NotFound:
    return NotFound("no such video", expected="an id of /v1/videos", found=name[:80])


def _not_removed(error: OSError | StorageError) -> StorageError:
    told = error.strerror if isinstance(error, OSError) else error.found
    return StorageError(
        "the video cannot be removed", found=told, remedy="The server tries again when it starts."
    )


def _kept(path: Path, data: bytes) -> None:
    try:
        keep(path, data)
    except OSError as error:
        raise StorageError("the server cannot store the picture", found=error.strerror) from error


def _linked(before: Path, path: Path) -> None:
    """Link the same file under a name that stays; make a copy where the system has no such
    names."""
    try:
        os.link(before, path)
    except OSError:
        shutil.copyfile(before, path)


def _settle(folder: Path) -> None:
    """Names in ``folder`` survive a loss of power."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
