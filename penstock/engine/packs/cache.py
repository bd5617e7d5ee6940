"""The packs that penstock makes by itself: where they lie, which there are, how to free them.

Each is the transformer alone, in a folder named by its format and by what it was made from, so that
other weights of the same name, or another version of the layout, are another pack.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.files.fields import read_object
from penstock.engine.packs.names import ORIGIN_SUFFIX, PROGRESS_SUFFIX
from penstock.engine.store.durable import NEW_SUFFIX, FileOps, remove_if_empty, storing
from penstock.engine.store.lock import JobLock
from penstock.errors import CheckpointError, JobLocked, StorageError, UsageError

ABOUT = "pack.json"
"""The last file of a pack to be written, and the first to be removed."""

_LOCK = "lock"
_PAUSE_S = 0.2
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*-[0-9a-f]{16}")


@dataclass(frozen=True)
class CachedPack:
    """A packed transformer in the cache.

    Attributes:
        source: what it was made from; empty where that is not known yet.
        complete: False: its packing was stopped; the next use continues it.
    """

    name: str
    path: Path
    nbytes: int
    source: str
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return {
            "name": self.name, "folder": str(self.path), "bytes": self.nbytes,
            "source": self.source, "complete": self.complete,
        }  # fmt: skip


def is_complete(folder: Path) -> bool:
    """Return whether the pack in ``folder`` was made to its end."""
    return (folder / ABOUT).exists()


@contextmanager
def being_changed(
    folder: Path, waiting: Callable[[JobLocked], None] | None = None
) -> Iterator[None]:
    """Provide an existing ``folder`` for one process alone.

    Args:
        folder: of a pack.
        waiting: called again and again while another process has it; None: that is an error.

    Raises:
        JobLocked: another one makes this pack, or removes it.
    """
    lock = _locked(folder, waiting)
    try:
        yield
    finally:
        lock.release()


def _locked(folder: Path, waiting: Callable[[JobLocked], None] | None) -> JobLock:
    while True:
        try:
            return JobLock(folder / _LOCK)
        except JobLocked as error:
            if waiting is None:
                raise
            waiting(error)
            time.sleep(_PAUSE_S)


def cached_packs(cache: Path) -> list[CachedPack]:
    """Return what is in the cache, by name; nothing if there is none. Packs may come and go
    meanwhile.

    Raises:
        StorageError: the cache cannot be read.
    """
    try:
        names = sorted(path.name for path in cache.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{cache} cannot be read", found=error.strerror) from error
    found = (_look(cache / name) for name in names if _NAME.fullmatch(name))
    return [pack for pack in found if pack is not None]


def _look(folder: Path) -> CachedPack | None:
    """Return the pack in ``folder``; None where there is none, or it is gone by now."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    return CachedPack(
        name=folder.name,
        path=folder,
        nbytes=sum(_size(Path(at, name)) for at, _, names in os.walk(folder) for name in names),
        source=_source(folder),
        complete=is_complete(folder),
    )


def _size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        return 0  # it was renamed or removed meanwhile
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _source(folder: Path) -> str:
    try:
        return str(read_object(folder / ABOUT).get("source", ""))
    except CheckpointError:
        return ""  # not finished, or damaged: it can be removed all the same


def remove_pack(cache: Path, name: str, ops: FileOps | None = None) -> int:
    """Remove one pack of the cache; gives the bytes freed.

    What makes it a pack goes first: an interrupted removal leaves an unfinished one.

    Raises:
        UsageError: the cache holds no pack of that name.
        JobLocked: it is being made.
        StorageError: it cannot be removed.
    """
    found = next((pack for pack in cached_packs(cache) if pack.name == name), None)
    if found is None:
        known = ", ".join(pack.name for pack in cached_packs(cache))
        raise UsageError("no such pack in the cache", expected=known or "a pack", found=repr(name))
    ops = ops or FileOps()
    with storing(ops, found.path):
        lock = _locked(found.path, None)
        try:
            ops.unlink(found.path / ABOUT)
            foreign = _empty(ops, found.path)
            lock.remove()
            if not foreign:
                remove_if_empty(ops, found.path)
        finally:
            lock.release()
    if foreign:
        raise StorageError(
            f"{found.path} was kept: it holds files that do not belong to a pack",
            found=", ".join(sorted(foreign)[:5]),
            remedy="The pack itself has been removed.",
        )
    return found.nbytes


def _empty(ops: FileOps, folder: Path) -> list[str]:
    """Remove a pack's files; gives the names of others."""
    foreign = []
    for place in folder.iterdir():
        if place.is_dir() and not place.is_symlink():
            left = [path for path in place.iterdir() if not _of_a_pack(path)]
            for path in place.iterdir():
                if path not in left:
                    ops.unlink(path)
            if not left:
                ops.rmdir(place)
            foreign += [f"{place.name}/{path.name}" for path in left]
        elif place.name not in (_LOCK, ABOUT + NEW_SUFFIX):
            foreign.append(place.name)
        elif place.name != _LOCK:
            ops.unlink(place)
    return foreign


def _of_a_pack(path: Path) -> bool:
    name = path.name.removesuffix(NEW_SUFFIX)
    for suffix in (PROGRESS_SUFFIX, ORIGIN_SUFFIX):
        name = name.removesuffix(suffix)
    known = name == "config.json" or name.endswith(".safetensors")
    return known and path.is_file() and not path.is_symlink()
