"""What is happening now: how far each running job is, and who is told of it.

A client that reads slowly loses reports of progress, and of changes of state the older ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MOST_PENDING = 64
"""Events that wait for one client."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        name: "video", "progress", "notice", "deleted" or "queue".
        video: the id that it is about, or None.
        data: plain values.
    """

    name: str
    video: str | None
    data: Mapping[str, Any]


@dataclass
class Live:
    """Where a running job is, as its worker last told.

    Attributes:
        told: the last "progress", without its preview.
        preview: the last one, a JPEG in base64.
    """

    told: dict[str, Any] = field(default_factory=dict)
    preview: str | None = None


class Subscription:
    """Events for one client, in their order.

    Args:
        video: those of that one alone; None: all.
    """

    def __init__(self, video: str | None) -> None:
        self._video, self._events = video, deque[Event]()
        self._there, self._closed = asyncio.Event(), False

    def offer(self, event: Event) -> None:
        """Take an event that it wants; progress makes room for what comes after it."""
        if self._video not in (None, event.video):
            return
        if len(self._events) >= MOST_PENDING:
            kept = [each for each in self._events if each.name != "progress"]
            self._events = deque(kept[-MOST_PENDING:])
        self._events.append(event)
        self._there.set()

    def close(self) -> None:
        """End, after what is there."""
        self._closed = True
        self._there.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._there.clear()
            await self._there.wait()


class Hub:
    """Of one server; used on its loop."""

    def __init__(self) -> None:
        self._live: dict[str, Live] = {}
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def live(self, name: str) -> Live | None:
        """Return where a job is; None: nobody has told, or it has ended."""
        return self._live.get(name)

    def progress(self, name: str, told: Mapping[str, Any]) -> None:
        """Take in what a worker tells of its job."""
        live = self._live.setdefault(name, Live())
        preview = told.get("preview")
        live.told = {key: value for key, value in told.items() if key not in ("event", "preview")}
        live.preview = preview or live.preview
        shown = None if preview is None else f"data:image/jpeg;base64,{preview}"
        self.publish(Event("progress", name, {"id": name, **live.told, "preview": shown}))

    def notice(self, name: str, message: str) -> None:
        """Take in what a worker wants the user to know."""
        self.publish(Event("notice", name, {"id": name, "message": message}))

    def rest(self, name: str) -> None:
        """Note that nobody works on a job any more; its last preview stays."""
        if (live := self._live.get(name)) is not None:
            live.told = {}

    def forget(self, name: str) -> None:
        """Take in that a job has ended."""
        self._live.pop(name, None)

    def publish(self, event: Event) -> None:
        """Tell everybody whom it concerns."""
        for each in self._subscriptions:
            each.offer(event)

    @contextmanager
    def subscribed(self, video: str | None = None) -> Iterator[Subscription]:
        """Events from now on, of one video or of all."""
        subscription = Subscription(video)
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.close()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End all streams: the server does."""
        self._closed = True
        for each in self._subscriptions:
            each.close()
