"""The events of one job, kept from the first to the last: for any number of consumers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from penstock.engine.run.events import Event


class EventLog:
    """Where a job puts its events. Safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._ended = False
        self._wakers: list[Callable[[], None]] = []

    def add(self, event: Event) -> None:
        """Add one more event; after :meth:`end` it is dropped."""
        with self._changed:
            if self._ended:
                return
            self._events.append(event)
            self._wake()

    def end(self) -> None:
        """No event comes after this."""
        with self._changed:
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for waker in self._wakers:
            waker()

    def since(self, index: int) -> tuple[list[Event], bool]:
        """Return the events from ``index`` on, and whether these are the last."""
        with self._changed:
            return self._events[index:], self._ended

    def wait(self, index: int) -> tuple[list[Event], bool]:
        """As :meth:`since`, once there is an event at ``index`` or the end has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._events) > index)
            return self._events[index:], self._ended

    @contextmanager
    def waking(self, waker: Callable[[], None]) -> Iterator[None]:
        """Call ``waker`` at every change, on the job's thread, until the context ends."""
        with self._changed:
            self._wakers.append(waker)
        try:
            yield
        finally:
            with self._changed:
                self._wakers.remove(waker)


class Events:
    """What `Job.events` gives: a job's events in order, each as it happens, to the job's end.

    For ``for`` (which blocks its thread between two events) and for ``async for`` (which does not
    block the loop) alike. Every iteration starts at the job's first event, so that several
    consumers, on any threads, each see all of them. Leaving a loop early does not stop the job.
    Iterating raises nothing of the job's: how it ended is told by `Job.result`.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def __iter__(self) -> Iterator[Event]:
        index, ended = 0, False
        while not ended:
            events, ended = self._log.wait(index)
            index += len(events)
            yield from events

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that was closed around its consumers is no business of the job's.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        index, ended = 0, False
        with self._log.waking(wake):
            while True:
                changed.clear()
                events, ended = self._log.since(index)
                index += len(events)
                for event in events:
                    yield event
                if ended:
                    return
                await changed.wait()
