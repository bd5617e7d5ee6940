"""A disk as slow as can be: a sampler's state is written only when something waits for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from penstock.engine.run.keeper import JournalKeeper, Point
from penstock.engine.store.journal import Journal


def make_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every save of a step begins when its keeper is asked to settle."""
    save_point, settle, save = JournalKeeper.save_point, JournalKeeper.settle, Journal.save_step
    given: list[int] = []
    wanted = threading.Semaphore(0)

    def kept(keeper: JournalKeeper, point: Point) -> None:
        save_point(keeper, point)
        given.append(point.step)

    def settled(keeper: JournalKeeper) -> None:
        if given:
            given.clear()
            wanted.release()
        settle(keeper)

    def slowly(*arguments: Any) -> None:
        wanted.acquire()
        save(*arguments)

    monkeypatch.setattr(JournalKeeper, "save_point", kept)
    monkeypatch.setattr(JournalKeeper, "settle", settled)
    monkeypatch.setattr(Journal, "save_step", slowly)
