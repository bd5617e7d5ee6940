"""What the threads of a stream wait for, seen as they begin to; and a clock that tests move."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.offload import mover, streamer, tiers
from penstock.offload.schedule import Ref


class Waiting:
    """While a test runs, all of a stream's seconds are this clock's, and its waits are known.

    A test moves the clock when those that it counts on wait: what is measured then follows from
    the order of events alone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now, self._changed = 0.0, threading.Condition()
        self._asked, self._waiting = threading.local(), set[Ref]()
        wait = streamer._Board.wait

        def seen(board: Any, ref: Ref) -> float | None:
            self._asked.ref = ref
            try:
                return wait(board, ref)
            finally:
                self._asked.ref = None
                with self._changed:
                    self._waiting.discard(ref)
                    self._changed.notify_all()

        monkeypatch.setattr(streamer._Board, "wait", seen)
        for module in (streamer, mover, tiers):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=self._read))

    def _read(self) -> float:
        """The time; who reads it inside a wait has begun to wait."""
        ref = getattr(self._asked, "ref", None)
        with self._changed:
            if ref is not None:
                self._waiting.add(ref)
                self._changed.notify_all()
            return self._now

    def spend(self, seconds: float, *while_waited_for: Ref) -> None:
        """Let time pass as soon as all of ``while_waited_for``, and nothing else, is waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting == set(while_waited_for))
            self._now += seconds
