"""Threads and device streams that take turns, so that a schedule is a choice and not an accident.

The threads are greenlets: one runs at a time. Where it could be interrupted it pauses, and a policy
names who goes on: a thread whose condition holds, or a stream of the virtual device whose next item
may run. A policy that ranks somebody last delays him as long as the waits between them allow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from greenlet import getcurrent, greenlet


class Stuck(Exception):
    """Everybody waits for somebody else."""


class Policy(Protocol):
    def choose(self, able: Sequence[str]) -> str:
        """Who goes on."""


class Dice:
    """Anybody."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, able: Sequence[str]) -> str:
        return self._random.choice(able)


class Ranks:
    """The first of an order in which names are put by a seed; ``last`` comes last, if given.

    Every now and then the ranks are drawn anew.
    """

    def __init__(self, seed: int, last: str = "", change: float = 0.02) -> None:
        self._random, self._last, self._change = random.Random(seed), last, change
        self._rank: dict[str, float] = {}

    def choose(self, able: Sequence[str]) -> str:
        if self._random.random() < self._change:
            self._rank.clear()
        return min(able, key=self._of)

    def _of(self, name: str) -> float:
        if name not in self._rank:
            self._rank[name] = 2.0 if self._last and self._last in name else self._random.random()
        return self._rank[name]


class Actor(Protocol):
    """A device stream: it does its next item when it is chosen."""

    name: str

    def can_step(self) -> bool: ...
    def step(self) -> None: ...


class Turns:
    """Whose turn it is.

    Attributes:
        actors: the device's streams.
        stuck: everybody waits for somebody else; nobody pauses any more.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parked: dict[str, Callable[[], bool]] = {}
        self._threads: dict[str, greenlet] = {"main": getcurrent()}
        self._names: dict[int, str] = {id(getcurrent()): "main"}
        self.actors: list[Actor] = []
        self.stuck = False

    @property
    def me(self) -> str:
        """The running thread."""
        return self._names[id(getcurrent())]

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; return when ``ready`` holds and it is this thread's turn again."""
        if not self.stuck:
            me = self.me
            self._parked[me] = ready
            chosen = self._next()
            if chosen != me:
                self._threads[chosen].switch()
        if self.stuck and not ready():
            raise Stuck(self.me)

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        """A new thread, which begins when it is its turn."""

        def run(*_: object) -> None:
            body()
            if not self.stuck:
                thread.parent = self._threads[self._next()]  # goes on when this one ends

        thread = greenlet(run)
        self._threads[name], self._names[id(thread)] = thread, name
        self._parked[name] = lambda: True

    def _next(self) -> str:
        """The thread whose turn it is; streams have theirs meanwhile."""
        while True:
            able = [name for name, ready in self._parked.items() if ready()]
            able += [actor.name for actor in self.actors if actor.can_step()]
            if not able:
                self.stuck = True
                return "main"
            chosen = self._policy.choose(able)
            if chosen in self._parked:
                del self._parked[chosen]
                return chosen
            next(actor for actor in self.actors if actor.name == chosen).step()

    def end(self, name: str) -> None:
        """End a thread that is stuck."""
        thread = self._threads[name]
        thread.parent = getcurrent()
        thread.throw(Stuck(name))


class TurnFuture(Future[Any]):
    """A future whose result is waited for in turn."""

    def __init__(self, turns: Turns, waited: Callable[[Future[Any]], None]) -> None:
        super().__init__()
        self._turns, self._waited = turns, waited

    def result(self, timeout: float | None = None) -> Any:
        self._turns.pause(self.done)
        self._waited(self)
        return super().result()


class TurnExecutor:
    """Stands in for ThreadPoolExecutor: a thread a task, each in its turn."""

    def __init__(self, turns: Turns, hooks: Any, prefix: str) -> None:
        self._turns, self._hooks, self._prefix = turns, hooks, prefix
        self._made: list[tuple[TurnFuture, str]] = []

    def submit(self, body: Callable[..., Any], *args: Any) -> TurnFuture:
        future = TurnFuture(self._turns, self._hooks.joined)
        name = self._hooks.name_task(self._prefix, args)
        forked = self._hooks.forks(name)

        def run() -> None:
            forked()
            try:
                result = body(*args)
            except BaseException as error:  # noqa: BLE001 - as the real executor does
                self._hooks.ends(future, name)
                future.set_exception(error)
            else:
                self._hooks.ends(future, name)
                future.set_result(result)

        self._made.append((future, name))
        self._turns.spawn(name, run)
        return future

    def shutdown(self) -> None:
        if self._hooks.drops(("shutdown", self._prefix)):
            return
        if self._turns.stuck:
            for future, name in self._made:
                if not future.done():
                    self._turns.end(name)
            return
        self._turns.pause(lambda: all(future.done() for future, _ in self._made))
        for future, _ in self._made:
            self._hooks.joined(future)
