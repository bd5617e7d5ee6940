"""Packs that were made on first use, kept in the user's cache directory.

Each has a folder named by its format and by what it was made from, so that another file of the same
name, or another version of the layout, is another pack.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.durable import FileOps, storing, write_atomically
from penstock.engine.keys import ComponentSource
from penstock.engine.locate import ModelSource, open_component, read_object
from penstock.engine.lock import JobLock
from penstock.errors import PenstockError, StorageError, UsageError
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.engine.pack import Progress
    from penstock.engine.packplan import ComponentPlan

_ABOUT = "pack.json"
_LOCK = "lock"
_MOST_RAM_BYTES = 2 << 30


def cache_directory() -> Path:
    """Where packs are kept, by the platform's convention; PENSTOCK_CACHE_DIR overrides it."""
    override = os.environ.get("PENSTOCK_CACHE_DIR")
    if override:
        return Path(override)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        base = Path(local) if local else Path.home() / "AppData" / "Local"
        return base / "penstock" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "penstock"
    # https://specifications.freedesktop.org/basedir-spec/: a relative path is to be ignored
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "penstock"


def in_format(
    source: ModelSource,
    wanted: str,
    root: Path | None = None,
    *,
    ram_bytes: int,
    progress: Progress | None = None,
) -> tuple[ModelSource, tuple[str, ...]]:
    """``source`` with its transformer's matrices in ``wanted``, packed first if need be, and what
    is to be said about it.

    Args:
        root: where packs are kept; None: `cache_directory`.
        ram_bytes: of which packing takes at most half.
        progress: told how far packing is.

    Raises:
        UsageError: no such format.
        CheckpointError: the transformer cannot be read.
        JobLocked: another process makes this pack.
        StorageError: no room for it, or the disk fails.
    """
    from penstock.engine.packplan import plan_component
    from penstock.quant.format import get_format

    get_format(wanted)
    if holds(source.transformer, wanted):
        return source, ()
    plan = plan_component(source.transformer, wanted)
    digest = hashlib.sha256(plan.layout.header).hexdigest()[:16]
    folder = (root or cache_directory()) / f"{wanted}-{digest}"
    is_new = not (folder / _ABOUT).exists()
    if is_new:
        _make(plan, source, wanted, folder, ram_bytes, progress)
    told = (
        f"{'packed the transformer as' if is_new else 'the transformer is read from its pack in'} "
        f"{wanted}: {folder} ({format_bytes(plan.layout.file_bytes)})"
    )
    return replace(source, transformer=open_component(folder / "transformer")), (told,)


def holds(source: ComponentSource, wanted: str) -> bool:
    """Whether the matrices of a transformer's blocks are stored as ``wanted`` already; its author
    may have kept some of them plain. Another layout of the same format's scales is no other format.
    """
    from penstock.quant.policy import default_policy

    stored = [source.weights[name] for name in default_policy(source.shapes)]
    found = {each.label.partition(" ")[0] for each in stored if not each.plain}
    if not found:
        return {each.label for each in stored} == {wanted}
    return found == {wanted}


def _make(
    plan: ComponentPlan,
    source: ModelSource,
    wanted: str,
    folder: Path,
    ram_bytes: int,
    progress: Progress | None,
) -> None:
    from penstock.engine.pack import LEAST_RAM_BYTES, check_space, pack_component
    from penstock.engine.packside import as_json, write_config

    ops = FileOps()
    total = plan.layout.file_bytes

    def report(nbytes: int) -> None:
        if progress is not None:
            progress("transformer", nbytes, total)

    check_space(ops, folder, [plan])
    with _locked(folder):
        room = max(LEAST_RAM_BYTES, min(_MOST_RAM_BYTES, ram_bytes // 2))
        pack_component(plan, folder / plan.file, room, ops, report)
        write_config(source.transformer, folder, ops)
        about = {"format": wanted, "source": str(source.transformer.raw.path)}
        with storing(ops, folder / _ABOUT, 0):
            write_atomically(ops, folder / _ABOUT, [as_json(about)])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = JobLock(folder / _LOCK)
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class CachedPack:
    """A pack in the cache.

    Attributes:
        name: of its folder.
        source: path of what it was made from; empty where it is not whole.
        whole: finished; else `generate` goes on with it.
    """

    name: str
    folder: Path
    source: str
    size_bytes: int
    whole: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {
            "name": self.name, "folder": str(self.folder), "source": self.source,
            "size_bytes": self.size_bytes, "whole": self.whole,
        }  # fmt: skip


def list_packs(root: Path | None = None) -> list[CachedPack]:
    """The packs in ``root`` (None: `cache_directory`), by name."""
    root = root or cache_directory()
    if not root.is_dir():
        return []
    return [_describe(path) for path in sorted(root.iterdir()) if (path / _LOCK).is_file()]


def _describe(folder: Path) -> CachedPack:
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        source = str(read_object(folder / _ABOUT)["source"])
    except (PenstockError, KeyError):
        return CachedPack(folder.name, folder, "", size_bytes, whole=False)
    return CachedPack(folder.name, folder, source, size_bytes, whole=True)


def remove_pack(name: str, root: Path | None = None) -> CachedPack:
    """Remove the pack called ``name`` (or whose name begins so); it can be made again.

    Raises:
        UsageError: none or several have that name.
        JobLocked: it is being made.
        StorageError: it cannot be removed.
    """
    packs = list_packs(root)
    found = [each for each in packs if each.name == name] or [
        each for each in packs if each.name.startswith(name)
    ]
    if len(found) != 1:
        raise UsageError(
            f"{len(found)} packs are called {name}",
            expected="one of " + (", ".join(each.name for each in packs) or "none"),
            remedy="`penstock cache ls` lists them.",
        )
    with _locked(found[0].folder):
        try:
            # First what makes it whole: a pack that was half removed is never taken for one.
            (found[0].folder / _ABOUT).unlink(missing_ok=True)
            shutil.rmtree(found[0].folder)
        except OSError as error:
            raise StorageError(
                f"{found[0].folder} cannot be removed", found=error.strerror
            ) from error
    return found[0]
