"""The packs that penstock makes by itself: where they lie, which there are, how to free them.

Each is the transformer alone, in a folder named by its format and by what it was made from, so that
other weights of the same name, or another version of the layout, are another pack.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.files.fields import read_object
from penstock.engine.store.durable import FileOps, storing
from penstock.engine.store.lock import JobLock
from penstock.errors import CheckpointError, UsageError

ABOUT = "pack.json"
"""The last file of a pack to be written, and the first to be removed."""

_LOCK = "lock"
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
        """Plain values, ready for json.dumps."""
        return {
            "name": self.name, "folder": str(self.path), "bytes": self.nbytes,
            "source": self.source, "complete": self.complete,
        }  # fmt: skip


def is_complete(folder: Path) -> bool:
    """Whether the pack in ``folder`` was made to its end."""
    return (folder / ABOUT).exists()


@contextmanager
def being_changed(folder: Path) -> Iterator[None]:
    """An existing ``folder`` for one process alone.

    Raises:
        JobLocked: another one makes this pack, or removes it.
    """
    lock = JobLock(folder / _LOCK)
    try:
        yield
    finally:
        lock.release()


def cached_packs(cache: Path) -> list[CachedPack]:
    """What is in the cache, by name; nothing if there is none."""
    if not cache.is_dir():
        return []
    folders = sorted(p for p in cache.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))
    return [
        CachedPack(
            name=folder.name,
            path=folder,
            nbytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
            source=_source(folder),
            complete=is_complete(folder),
        )
        for folder in folders
    ]


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
        with being_changed(found.path):
            ops.unlink(found.path / ABOUT)
            for path in found.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        shutil.rmtree(found.path)  # with the lock's file, which Windows does not remove while open
    return found.nbytes
