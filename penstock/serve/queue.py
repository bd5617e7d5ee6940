"""The queue: what was asked for and how far it is, in SQLite, so that it survives the server.

A row is written before its client is answered. What a job has computed lies in the job's own folder
(`penstock.engine.store.journal`); a row only says who is to do it. Every change is one transaction:
a server that is killed between two of them leaves a queue that the next one goes on with.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from penstock.closing import Closing
from penstock.errors import StorageError, UsageError

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
"""States, as the dialect has them."""

CANCELLED = {"code": "cancelled", "message": "The job was cancelled; it can be resumed."}

MOST_CRASHES = 3
"""Deaths of workers under a job before it counts as failed."""

_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS videos (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    completed_at REAL,
    status TEXT NOT NULL,
    place REAL NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    intent TEXT,
    crashes INTEGER NOT NULL DEFAULT 0,
    progress INTEGER NOT NULL DEFAULT 0,
    order_json TEXT NOT NULL,
    plan_json TEXT NOT NULL,
    error_json TEXT,
    report_json TEXT,
    size_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS videos_by_status ON videos (status, place);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_WAITING = "status = 'queued' AND worker IS NULL"


@dataclass(frozen=True)
class Row:
    """A video as the queue has it.

    Attributes:
        id: that clients use, and the name of its folder.
        created_at, completed_at: seconds since 1970.
        status: `QUEUED`, `RUNNING`, `COMPLETED` or `FAILED`.
        place: among those that wait: the lowest is next.
        paused: it waits until it is resumed.
        worker: who is doing it.
        intent: what is to become of it when its worker has stopped: "pause", "cancel", "delete".
        crashes: how many workers have died under it.
        progress: percent.
        order: what a worker is told (`penstock.serve.runner.Order`), as plain values.
        plan: as the planner gave it, likewise.
        error: code and message.
        report: of the finished job.
        size_bytes: of the video.
    """

    id: str
    created_at: float
    completed_at: float | None
    status: str
    place: float
    paused: bool
    worker: str | None
    intent: str | None
    crashes: int
    progress: int
    order: Mapping[str, Any]
    plan: Mapping[str, Any]
    error: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    size_bytes: int

    @property
    def waits(self) -> bool:
        """Whether a worker may still take it, paused or not."""
        return self.status == QUEUED and self.worker is None


@dataclass(frozen=True)
class Page:
    """A part of the list: its rows, and whether there are more."""

    rows: tuple[Row, ...]
    has_more: bool


class Queue(Closing):
    """Of one server. Its methods may be called on any thread; those that change it wait for the
    disk.

    Args:
        path: of the database; made if absent.

    Raises:
        StorageError: it cannot be opened, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = _connected(path), _connected(path)
            with self._change() as connection:
                found = connection.execute("PRAGMA user_version").fetchone()[0]
                if found not in (0, _VERSION):
                    raise StorageError(
                        f"{path} was made by another version",
                        expected=str(_VERSION),
                        found=str(found),
                        remedy="Give the server another folder.",
                    )
            self._writer.executescript(_TABLES + f"PRAGMA user_version = {_VERSION};")
        except sqlite3.Error as error:
            raise StorageError(f"{path} cannot be opened", found=str(error)) from error

    def close(self) -> None:
        """Close the database, once nobody uses it: a change goes on in its thread when the task
        that waits for it is cancelled, and SQLite crashes if it is closed in between."""
        with self._reading:
            self._reader.close()
        with self._writing:
            self._writer.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Provide one transaction.

        Raises:
            StorageError: the database cannot be written.
        """
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                self._give_up()
                raise StorageError(f"{self._path} cannot be written", found=str(error)) from error
            except BaseException:
                self._give_up()
                raise

    def _give_up(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # it is closed, and so is any transaction
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")

    def _rows(self, clause: str, *values: Any) -> list[Row]:
        with self._reading:
            found = self._reader.execute(f"SELECT * FROM videos {clause}", values).fetchall()
        return [_row(each) for each in found]

    # What there is

    def get(self, name: str) -> Row | None:
        """Return the video of that id."""
        return next(iter(self._rows("WHERE id = ?", name)), None)

    def page(
        self,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
        status: str | None = None,
    ) -> Page:
        """Return the videos by the time that they were asked for.

        Args:
            after: the id of the last one that is known already; an unknown one ends the list.
            limit: how many at most.
            order: "asc" or "desc".
            status: of that state only.
        """
        clauses, values = ["1"], list[Any]()
        if after is not None:
            sign = "<" if order == "desc" else ">"
            clauses.append(f"number {sign} (SELECT number FROM videos WHERE id = ?)")
            values.append(after)
        if status is not None:
            clauses.append("status = ?")
            values.append(status)
        direction = "DESC" if order == "desc" else "ASC"
        clause = f"WHERE {' AND '.join(clauses)} ORDER BY number {direction} LIMIT ?"
        rows = self._rows(clause, *values, limit + 1)
        return Page(tuple(rows[:limit]), len(rows) > limit)

    def waiting(self) -> tuple[str, ...]:
        """Return the ids of those that wait, the next one first; paused ones among them."""
        with self._reading:
            found = self._reader.execute(
                f"SELECT id FROM videos WHERE {_WAITING} ORDER BY place, number"
            ).fetchall()
        return tuple(each[0] for each in found)

    def running(self) -> tuple[str, ...]:
        """Return the ids of those that are being done, or were when the last server ended."""
        with self._reading:
            found = self._reader.execute(
                "SELECT id FROM videos WHERE status = 'in_progress' ORDER BY place, number"
            ).fetchall()
        return tuple(each[0] for each in found)

    def counts(self) -> dict[str, int]:
        """Return how many there are in each state."""
        with self._reading:
            found = self._reader.execute("SELECT status, COUNT(*) FROM videos GROUP BY status")
            return dict.fromkeys((QUEUED, RUNNING, COMPLETED, FAILED), 0) | dict(found.fetchall())

    def kept_bytes(self) -> int:
        """Count the bytes of all finished videos."""
        with self._reading:
            found = self._reader.execute("SELECT COALESCE(SUM(size_bytes), 0) FROM videos")
            return int(found.fetchone()[0])

    @property
    def paused(self) -> bool:
        """Whether no further job is begun."""
        with self._reading:
            found = self._reader.execute("SELECT value FROM facts WHERE name = 'paused'").fetchone()
        return found is not None and found[0] == "1"

    # What clients change

    def check_room(self, most: int) -> None:
        """Refuse another video where ``most`` wait.

        Raises:
            UsageError: they do.
        """
        _check_room(len(self.waiting()), most)

    def add(
        self,
        name: str,
        order: Mapping[str, Any],
        plan: Mapping[str, Any],
        most: int | None = None,
    ) -> Row:
        """Put a video behind those that wait.

        Args:
            most: of them, this one among them, however many are added at once; None: any number.

        Raises:
            StorageError: the database cannot be written; UsageError: so many wait already.
        """
        with self._change() as connection:
            if most is not None:
                count = f"SELECT COUNT(*) FROM videos WHERE {_WAITING}"
                _check_room(connection.execute(count).fetchone()[0], most)
            connection.execute(
                "INSERT INTO videos (id, created_at, status, place, order_json, plan_json) VALUES "
                "(?, ?, 'queued', (SELECT COALESCE(MAX(place), 0) + 1 FROM videos), ?, ?)",
                (name, time.time(), json.dumps(order), json.dumps(plan)),
            )
            return _one(connection, name)

    def pause_all(self, paused: bool) -> None:
        """Begin no further job, or begin them again."""
        with self._change() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO facts VALUES ('paused', ?)", (str(int(paused)),)
            )

    def ask(self, name: str, intent: str) -> Row:
        """Pause, cancel or delete a video: at once where nobody works on it, else it is noted, and
        done when its worker has stopped. What is deleted has ``intent`` "delete" until `remove`.

        Raises:
            KeyError: no such video; UsageError: it has ended, and is neither paused nor cancelled.
        """
        with self._change() as connection:
            row = _one(connection, name)
            if row.status in (COMPLETED, FAILED) and intent != "delete":
                raise UsageError(
                    f"the video is {row.status}",
                    expected="one that waits or runs",
                    found=row.status,
                )
            if row.intent != "delete":
                connection.execute("UPDATE videos SET intent = ? WHERE id = ?", (intent, name))
            if row.worker is None:
                _obey(connection, name)
            return _one(connection, name)

    def resume(self, name: str) -> Row:
        """Let a paused, cancelled or failed video go on, from where it stood.

        Raises:
            KeyError: no such video; UsageError: it is neither.
        """
        with self._change() as connection:
            row = _one(connection, name)
            if row.intent is not None or not (row.status == FAILED or row.paused):
                raise UsageError(
                    f"the video is {row.status}",
                    expected="one that is paused, cancelled or failed",
                    found=row.status if row.intent is None else f"about to {row.intent}",
                )
            connection.execute(
                "UPDATE videos SET status = 'queued', paused = 0, error_json = NULL, crashes = 0, "
                "completed_at = NULL WHERE id = ?",
                (name,),
            )
            return _one(connection, name)

    def move(self, name: str, position: int) -> Row:
        """Give a video that waits its place among those: 0 is next.

        Raises:
            KeyError: no such video; UsageError: it does not wait.
        """
        with self._change() as connection:
            row = _one(connection, name)
            if not row.waits:
                raise UsageError(
                    f"the video is {row.status}", expected="one that waits", found=row.status
                )
            found = connection.execute(
                f"SELECT id, place FROM videos WHERE {_WAITING} ORDER BY place, number"
            ).fetchall()
            names = [each["id"] for each in found]
            names.remove(name)
            names.insert(min(max(position, 0), len(names)), name)
            places = sorted(each["place"] for each in found)
            connection.executemany(
                "UPDATE videos SET place = ? WHERE id = ?", list(zip(places, names, strict=True))
            )
            return _one(connection, name)

    def remove(self, name: str) -> None:
        """Forget a video; its files are gone by now."""
        with self._change() as connection:
            connection.execute("DELETE FROM videos WHERE id = ?", (name,))

    # What workers change

    def recover(self) -> tuple[Row, ...]:
        """After a start: nobody works on anything, and what was asked for is done. Returns those
        that are to be deleted."""
        with self._change() as connection:
            connection.execute("UPDATE videos SET worker = NULL")
            for each in connection.execute("SELECT id FROM videos WHERE intent IS NOT NULL"):
                _obey(connection, each["id"])
            found = connection.execute("SELECT * FROM videos WHERE intent = 'delete'").fetchall()
            return tuple(_row(each) for each in found)

    def claim(self, worker: str, without: Sequence[str] = ()) -> Row | None:
        """Return the next job for a worker, which it has from now on: first those that somebody had
        begun, then by place.

        Args:
            without: ids of jobs that it cannot do.

        Raises:
            StorageError: the database cannot be written.
        """
        others = f" AND id NOT IN ({', '.join('?' * len(without))})" if without else ""
        with self._change() as connection:
            stopped = connection.execute("SELECT value FROM facts WHERE name = 'paused'").fetchone()
            begun_only = "0" if stopped is not None and stopped[0] == "1" else "1"
            found = connection.execute(
                "SELECT id FROM videos WHERE worker IS NULL AND intent IS NULL AND (status = "
                f"'in_progress' OR (status = 'queued' AND paused = 0 AND {begun_only}))"
                f"{others} ORDER BY status = 'queued', place, number LIMIT 1",
                tuple(without),
            ).fetchone()
            if found is None:
                return None
            connection.execute(
                "UPDATE videos SET worker = ?, status = 'in_progress' WHERE id = ?",
                (worker, found["id"]),
            )
            return _one(connection, found["id"])

    def note(self, name: str, progress: int) -> None:
        """How far a job is, in percent; it does not go back."""
        with self._change() as connection:
            connection.execute(
                "UPDATE videos SET progress = MAX(progress, ?) WHERE id = ?", (progress, name)
            )

    def complete(self, name: str, report: Mapping[str, Any], size_bytes: int) -> Row:
        """Note that a video is there; what was asked of it meanwhile is too late, unless it is
        deleted."""
        with self._change() as connection:
            connection.execute(
                "UPDATE videos SET status = 'completed', progress = 100, worker = NULL, error_json "
                "= NULL, intent = CASE intent WHEN 'delete' THEN intent END, completed_at = ?, "
                "report_json = ?, size_bytes = ? WHERE id = ?",
                (time.time(), json.dumps(report), size_bytes, name),
            )
            return _one(connection, name)

    def fail(self, name: str, error: Mapping[str, Any]) -> Row:
        """Note that a job has ended without a video."""
        with self._change() as connection:
            connection.execute(
                "UPDATE videos SET status = 'failed', worker = NULL, error_json = ?, completed_at "
                "= ?, intent = CASE intent WHEN 'delete' THEN intent END WHERE id = ?",
                (json.dumps(error), time.time(), name),
            )
            return _one(connection, name)

    def stopped(self, name: str) -> Row:
        """Note that a worker has stopped as it was asked to; without having been, the job is begun
        again."""
        with self._change() as connection:
            connection.execute("UPDATE videos SET worker = NULL WHERE id = ?", (name,))
            _obey(connection, name)
            return _one(connection, name)

    def crashed(self, name: str, how: str) -> Row:
        """Note that a worker has died under a job: another one goes on with it, a few times."""
        row = self.stopped(name)
        if row.status != RUNNING:
            return row
        if row.crashes + 1 >= MOST_CRASHES:
            told = f"{row.crashes + 1} workers have died under this job; the last one {how}."
            return self.fail(name, {"code": "worker_died", "message": told})
        with self._change() as connection:
            connection.execute("UPDATE videos SET crashes = crashes + 1 WHERE id = ?", (name,))
            return _one(connection, name)


def _check_room(waiting: int, most: int) -> None:
    if waiting >= most:
        raise UsageError(
            "too many videos wait",
            expected=f"at most {most:,}",
            found=f"{waiting:,}",
            remedy="Wait for some, or cancel them.",
        )


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _one(connection: sqlite3.Connection, name: str) -> Row:
    found = connection.execute("SELECT * FROM videos WHERE id = ?", (name,)).fetchone()
    if found is None:
        raise KeyError(name)
    return _row(found)


def _obey(connection: sqlite3.Connection, name: str) -> None:
    """Do what was asked of a job on which nobody works: "delete" is left to who removes files."""
    row = _one(connection, name)
    if row.intent == "pause":
        change, values = "status = 'queued', paused = 1, intent = NULL", list[Any]()
    elif row.intent == "cancel":
        change = "status = 'failed', error_json = ?, completed_at = ?, paused = 0, intent = NULL"
        values = [json.dumps(CANCELLED), time.time()]
    else:
        return
    if row.status in (QUEUED, RUNNING):
        connection.execute(f"UPDATE videos SET {change} WHERE id = ?", (*values, name))


def _row(found: sqlite3.Row) -> Row:
    values = dict(found)
    values.pop("number")
    for name in ("order", "plan", "error", "report"):
        text = values.pop(f"{name}_json")
        values[name] = None if text is None else _parsed(text)
    values["paused"] = bool(values["paused"])
    return Row(**values)


@lru_cache(maxsize=512)
def _parsed(text: str) -> Mapping[str, Any]:
    """Read once, as clients look at the same rows again and again; nobody changes what is read."""
    value: Mapping[str, Any] = json.loads(text)
    return value


def ids(rows: Sequence[Row]) -> list[str]:
    """Return the ids of rows, in their order."""
    return [row.id for row in rows]
