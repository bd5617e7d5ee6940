"""What a pack was made from, beside it: a checksum of every byte of each file.

The note names the pack by its own checksums, so that it is never taken for that of another one, in
whichever order the two reached the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from penstock.engine.packs.file import PackFile, digest
from penstock.engine.packs.names import ORIGIN_SUFFIX
from penstock.engine.store.durable import FileOps, read_whole, write_atomically
from penstock.errors import CheckpointError, JournalError

Origin = Mapping[str, str]
"""Checksums of files, by their names (`penstock.engine.packs.plan.ComponentPlan.origins`)."""


def read_origin(ops: FileOps, path: Path) -> Origin | None:
    """Return what the pack at ``path`` was made from; None where nothing whole says so."""
    try:
        content = read_whole(ops, _beside(path))
        note = {} if content is None else json.loads(content)
        found = note["source"] if note["pack"] == _own(path) else None
    except (JournalError, CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_origin(ops: FileOps, path: Path, pack: Path, made_from: Origin) -> None:
    """Note what the finished ``pack``, which is to be named ``path``, was made from.

    Raises:
        StorageError: the disk is full or fails.
    """
    note = {"pack": _own(pack), "source": dict(made_from)}
    write_atomically(ops, _beside(path), [json.dumps(note, indent=1).encode()])


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ORIGIN_SUFFIX)


def _own(path: Path) -> str:
    runs = PackFile.open(path).runs.values()
    return digest(b"".join(run.checksum for run in runs)).hex()
