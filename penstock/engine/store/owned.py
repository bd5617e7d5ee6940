"""Which files in a job's directory penstock has made: each is known by what it holds.

A user's own file may have any name. Nothing is removed unless its content is proven to be the
job's: by a seal over all of it that names the job, by the size and checksum that the record has of
it, or by the job's id in the name of a file that was never finished.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from penstock.engine.store.digest import stamp
from penstock.engine.store.durable import FileOps, storing
from penstock.engine.store.lock import is_lock
from penstock.engine.store.names import (
    JOB_FILES,
    LOCK_FILE,
    PICTURES,
    RESERVE_FILE,
    is_sealed,
    is_unfinished,
)
from penstock.engine.store.sealed import open_json, verified_metadata
from penstock.errors import JournalError, StorageError

_MARK = re.compile(rb"penstock reserve ([0-9a-f]{32})\n")
_SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """The files in a job's directory: those that are proven to be the job's, and all others.

    Attributes:
        ours: by name, the records last: a removal that is cut short can then be repeated.
        foreign: by name.
    """

    ours: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def shown(self) -> str:
        """Some of the names of what is not ours."""
        more = ", ..." if len(self.foreign) > _SHOWN else ""
        return ", ".join(self.foreign[:_SHOWN]) + more


def reserve_mark(job: str) -> bytes:
    """Return the first bytes of the file that keeps disk space for ``job``."""
    return f"penstock reserve {job}\n".encode()


def sort_out(
    ops: FileOps,
    folder: Path,
    job: str | None = None,
    pictures: Mapping[str, Any] = MappingProxyType({}),
) -> Contents:
    """Tell the job's files in ``folder`` from others.

    Args:
        ops: the file operations.
        folder: the job's directory.
        job: the job's id; None where no record is left to tell it.
        pictures: what the record has of them, as `pictures_in` gives it.

    Raises:
        StorageError: the folder cannot be read.
    """
    with storing(ops, folder):
        names = ops.names(folder)
    ids = {name: _owner(ops, folder / name) for name in names}
    job = job or next((each for each in ids.values() if each is not None), None)
    ours = {name for name in names if job is not None and ids[name] == job}
    ours |= {name for name, told in pictures.items() if name in names and _is(folder / name, told)}
    if ours:
        # The two records stand or fall with the rest: a damaged one can prove nothing by itself.
        ours |= {name for name in names if name in JOB_FILES or is_unfinished(name, job)}
        ours |= {LOCK_FILE} & set(names) if is_lock(folder / LOCK_FILE) else set()
    ordered = sorted(ours, key=lambda name: (name in JOB_FILES, name))
    return Contents(tuple(ordered), tuple(name for name in names if name not in ours))


def pictures_in(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size and checksum of each picture of a job's request, by the name of its copy."""
    named = {file: request.get(entry) for entry, file in PICTURES.items()}
    return {file: told for file, told in named.items() if told is not None}


def check_vacant(ops: FileOps, folder: Path) -> tuple[str, ...]:
    """Refuse a folder that a job cannot be begun in; gives leftovers of a beginning that was cut
    short before its first record.

    Raises:
        JournalError: it holds a job, or somebody's files; names them.
        StorageError: it cannot be read.
    """
    with storing(ops, folder):
        names = ops.names(folder)
    left = tuple(name for name in names if is_unfinished(name))
    lock = {LOCK_FILE} if is_lock(folder / LOCK_FILE) else set()
    others = [name for name in names if name not in {*left, *lock}]
    if not others:
        return left
    if sort_out(ops, folder).ours:
        raise JournalError(
            f"{folder} holds a job already",
            expected="an empty folder",
            found=", ".join(name for name in others if name in JOB_FILES) or others[0],
            remedy="Continue it with `penstock resume`, or remove it with `penstock jobs rm`.",
        )
    raise JournalError(
        f"{folder} holds files that are no job's",
        expected="an empty folder, or a new one",
        found=Contents((), tuple(others)).shown,
        remedy="Name another folder with --job.",
    )


def _owner(ops: FileOps, path: Path) -> str | None:
    """Return the id of the job whose file this is by its own content; None where that tells
    nothing."""
    try:
        if path.name in JOB_FILES:
            job = open_json(ops.read(path)).get("job")
            return job if isinstance(job, str) else None
        if path.name == RESERVE_FILE:
            mark = _MARK.match(ops.read(path, 64))
            return None if mark is None else mark[1].decode()
        if is_sealed(path.name):
            with ops.open(path) as file:
                return verified_metadata(file).get("job")
    except (OSError, JournalError):
        return None
    return None


def _is(path: Path, picture: Mapping[str, Any]) -> bool:
    try:
        return stamp(path) == picture
    except StorageError:
        return False
