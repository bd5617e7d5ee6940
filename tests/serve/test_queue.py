"""The queue by itself: what survives, who gets what, and in which order."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import StorageError, UsageError
from penstock.serve.queue import MOST_CRASHES, Queue, ids


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.sqlite"


@pytest.fixture
def queue(path: Path) -> Iterator[Queue]:
    with Queue(path) as queue:
        for name in ("a", "b", "c"):
            queue.add(name, {"settings": {}}, {"seconds": 1})
        yield queue


def test_each_is_claimed_once_by_its_place(queue: Queue) -> None:
    queue.move("c", 0)
    queue.ask("a", "pause")
    found = [queue.claim("one"), queue.claim("two"), queue.claim("three")]
    assert [None if row is None else row.id for row in found] == ["c", "b", None]
    queue.resume("a")
    row = queue.claim("one")
    assert row is not None
    assert (row.id, row.status, row.worker) == ("a", "in_progress", "one")


def test_what_was_begun_goes_on_first_in_the_next_server(queue: Queue, path: Path) -> None:
    queue.claim("one")
    queue.note("a", 40)
    queue.note("a", 30)
    queue.move("c", 0)
    with Queue(path) as after:  # nobody has closed the first one, as after a kill
        assert after.recover() == ()
        row = after.get("a")
        assert row is not None
        assert (row.status, row.worker, row.progress) == ("in_progress", None, 40)
        again = after.claim("one")
        assert again is not None
        assert again.id == "a"
        assert after.waiting() == ("c", "b")


def test_a_paused_queue_gives_nothing_but_what_was_begun(queue: Queue) -> None:
    queue.claim("one")
    queue.pause_all(True)
    assert queue.claim("two") is None
    queue.recover()
    row = queue.claim("two")
    assert row is not None
    assert row.id == "a"


@pytest.mark.parametrize(
    ("intent", "status", "paused"), [("pause", "queued", True), ("cancel", "failed", False)]
)
@pytest.mark.parametrize("ends", ["its worker stops", "the server dies"])
def test_what_is_asked_of_a_running_one_is_done_when_nobody_works_on_it(
    queue: Queue, intent: str, status: str, paused: bool, ends: str
) -> None:
    queue.claim("one")
    assert queue.ask("a", intent).status == "in_progress"
    if ends == "its worker stops":
        queue.stopped("a")
    else:
        queue.recover()
    row = queue.get("a")
    assert row is not None
    assert (row.status, row.paused, row.intent, row.worker) == (status, paused, None, None)


def test_a_deletion_is_not_forgotten(queue: Queue) -> None:
    queue.claim("one")
    queue.ask("a", "delete")
    queue.ask("a", "pause")  # too late
    assert ids(queue.recover()) == ["a"]
    assert queue.claim("one") is not None
    queue.remove("a")
    assert queue.get("a") is None


def test_what_was_asked_too_late_changes_nothing(queue: Queue) -> None:
    queue.claim("one")
    queue.ask("a", "cancel")
    row = queue.complete("a", {}, 7)
    assert (row.status, row.intent, row.progress, row.error) == ("completed", None, 100, None)
    assert queue.kept_bytes() == 7
    with pytest.raises(UsageError, match="completed"):
        queue.ask("a", "cancel")
    with pytest.raises(UsageError, match="completed"):
        queue.resume("a")


def test_a_job_under_which_workers_die_fails_in_the_end(queue: Queue) -> None:
    for count in range(1, MOST_CRASHES):
        queue.claim("one")
        assert queue.crashed("a", "was killed").crashes == count
    queue.claim("one")
    row = queue.crashed("a", "was killed")
    assert (row.status, row.error and row.error["code"]) == ("failed", "worker_died")
    assert queue.resume("a").crashes == 0


def test_a_death_after_a_cancel_is_no_crash(queue: Queue) -> None:
    queue.claim("one")
    queue.ask("a", "pause")
    row = queue.crashed("a", "was killed")
    assert (row.status, row.paused, row.crashes) == ("queued", True, 0)


def test_there_is_nothing_of_that_name(queue: Queue) -> None:
    for call in (queue.resume, lambda name: queue.ask(name, "pause"), lambda n: queue.move(n, 0)):
        with pytest.raises(KeyError):
            call("z")
    assert queue.claim("one") is not None  # the failed transactions have left no lock


def test_a_database_of_another_version_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="another version"):
        Queue(path)


def test_what_is_looked_at_again_is_not_parsed_again(queue: Queue) -> None:
    first, second = queue.get("a"), queue.page(status="queued", order="asc").rows[0]
    assert first is not None and first == second
    assert first.order is second.order and first.plan is second.plan


class _Asked:
    """A lock that says when a second one asks for it."""

    def __init__(self) -> None:
        self._lock, self._asked = threading.Lock(), 0
        self.again = threading.Event()

    def __enter__(self) -> None:
        self._asked += 1
        if self._asked == 2:
            self.again.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("which", ["_reading", "_writing"])
def test_it_is_closed_when_nobody_uses_it_any_more(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    lock = _Asked()
    monkeypatch.setattr(queue, which, lock)

    def close() -> None:
        queue.close()
        lock.again.set()  # had it not asked, nobody would wait for it in vain

    closing = threading.Thread(target=close)
    with queue._change() if which == "_writing" else lock:
        closing.start()
        lock.again.wait()
        found = queue._writer if which == "_writing" else queue._reader
        assert len(found.execute("SELECT id FROM videos").fetchall()) == 3
    closing.join()
    with pytest.raises(StorageError, match="cannot be written"):
        queue.claim("one")
