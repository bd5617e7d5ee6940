"""The packs that penstock makes by itself: where they lie, which there are, how to free them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.durable import FileOps, storing
from penstock.engine.fingerprint import stamp
from penstock.engine.locate import ModelSource
from penstock.engine.packside import INDEX
from penstock.errors import UsageError

VARIABLE = "PENSTOCK_CACHE"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*-[0-9a-f]{16}")


@dataclass(frozen=True)
class CachedPack:
    """A packed model in the cache.

    Attributes:
        complete: False: its packing was stopped; the next use continues it.
    """

    name: str
    path: Path
    nbytes: int
    complete: bool


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where packs are kept: ``$PENSTOCK_CACHE``, else the platform's cache directory.

    Args:
        environ: the environment; None takes the process's own.
    """
    environ = os.environ if environ is None else environ
    if environ.get(VARIABLE):
        return Path(environ[VARIABLE]).expanduser()
    if sys.platform == "win32":
        base = environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "penstock" / "packs"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "penstock" / "packs"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "packs"


def pack_folder(source: ModelSource, wanted: str, cache: Path) -> Path:
    """The folder in ``cache`` for ``source`` packed as ``wanted``: a function of what its files
    hold, not of where they lie.

    Raises:
        StorageError: a file of the model cannot be read.
    """
    files = {
        part.component: sorted(json.dumps(stamp(path)) for path in part.raw.stamps)
        for part in source.components()
    }
    key = hashlib.sha256(json.dumps([wanted, files], sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^a-z0-9.]+", "-", source.transformer.family.lower()).strip("-")
    return cache / f"{label}-{wanted}-{key}"


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
            complete=(folder / INDEX).exists(),
        )
        for folder in folders
    ]


def remove_pack(cache: Path, name: str, ops: FileOps | None = None) -> int:
    """Remove one pack of the cache; gives the bytes freed.

    The index goes first: what an interrupted removal leaves is an unfinished pack, never a model.

    Raises:
        UsageError: the cache holds no pack of that name.
        StorageError: it cannot be removed.
    """
    found = next((pack for pack in cached_packs(cache) if pack.name == name), None)
    if found is None:
        known = ", ".join(pack.name for pack in cached_packs(cache))
        raise UsageError("no such pack in the cache", expected=known or "a pack", found=repr(name))
    ops = ops or FileOps()
    with storing(ops, found.path):
        ops.unlink(found.path / INDEX)
        shutil.rmtree(found.path)
    return found.nbytes
