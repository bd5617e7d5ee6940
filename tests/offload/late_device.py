"""A device whose streams work as late, or as early, as the waits between them allow.

Stands in for `torch.cuda` in the tiers: streams hold what was issued until somebody has to wait for
it, or until a dice says that they get on. Whatever is not forbidden by an event, happens.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Event:
    """A moment in a stream; a stream may wait for it, or the host."""

    def __init__(self, cuda: LateCuda) -> None:
        self._cuda = cuda
        self.stream: Stream | None = None
        self.is_done = False

    def record(self, stream: Stream) -> None:
        self.stream = stream
        stream.push(self)

    def synchronize(self) -> None:
        with self._cuda.lock:
            self._cuda.run_until(self)

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, other: Event) -> float:
        assert self.is_done and other.is_done
        return 1000.0


class Stream:
    """What was issued and is not done: functions, events to record, events to wait for."""

    def __init__(self, cuda: LateCuda) -> None:
        self._cuda = cuda
        self._left: deque[Any] = deque()
        cuda.streams.append(self)

    def push(self, item: Any) -> None:
        with self._cuda.lock:
            self._left.append(item)
            self._cuda.get_on()

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "an event that was never recorded"
        self.push(("wait", event))

    def wait_stream(self, other: Stream) -> None:
        event = Event(self._cuda)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event(self._cuda)
        event.record(self)
        event.synchronize()

    def step(self, *, insist: bool) -> bool:
        """Do one thing, if there is one and nothing forbids it."""
        if not self._left:
            return False
        item = self._left[0]
        if isinstance(item, tuple):
            event = item[1]
            if not event.is_done:
                if not insist:
                    return False
                self._cuda.run_until(event)
        self._left.popleft()
        if isinstance(item, Event):
            item.is_done = True
        elif callable(item):
            item()
        return True


class LateCuda:
    """The part of `torch.cuda` that the tiers use."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self._dice = random.Random(seed)
        self.compute = Stream(self)

    def current_stream(self, device: Any) -> Stream:
        return self.compute

    def Stream(self, device: Any) -> Stream:  # noqa: N802 - torch's name
        return Stream(self)

    def Event(self, **options: bool) -> Event:  # noqa: N802 - torch's name
        return Event(self)

    def run_until(self, event: Event) -> None:
        while not event.is_done:
            assert event.stream is not None
            assert event.stream.step(insist=True), "waits for something that never comes"

    def get_on(self) -> None:
        """Let any stream do anything that it may do now, or nothing."""
        while self._dice.random() < 0.6:
            self._dice.choice(self.streams).step(insist=False)

    def issue(self, work: Callable[[], None]) -> None:
        """Issue some computation."""
        self.compute.push(work)
