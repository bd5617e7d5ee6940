"""The folder that a model is packed into: a new one, or one that penstock has begun or made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from penstock.engine.files.fields import read_object
from penstock.engine.files.source import open_raw
from penstock.engine.files.storage import PACK_METADATA
from penstock.engine.packs.names import PROGRESS_SUFFIX
from penstock.engine.packs.plan import ComponentPlan
from penstock.engine.packs.side import INDEX
from penstock.engine.store.durable import NEW_SUFFIX
from penstock.errors import CheckpointError, StorageError, UsageError

_SHOWN = 5


def check_target(folder: Path, plans: Sequence[ComponentPlan]) -> None:
    """Refuse a folder in which packing would replace what penstock did not make: the model itself,
    for one.

    Raises:
        UsageError: it holds somebody's files; names them.
        StorageError: it cannot be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        weights = [folder / plan.file for plan in plans]
        foreign = [str(path) for path in weights if path.exists() and not _is_pack(path)]
    except OSError as error:
        raise StorageError(f"{folder} cannot be used", found=error.strerror) from error
    if foreign or (names and not _is_ours(folder, weights)):
        raise UsageError(
            f"{folder} holds files that penstock did not make",
            expected="a new or empty folder, or one that was packed into before",
            found=", ".join((foreign or names)[:_SHOWN]),
            remedy="Choose another folder for -o.",
        )


def _is_pack(path: Path) -> bool:
    try:
        return PACK_METADATA in open_raw(path).metadata
    except CheckpointError:
        return False


def _is_ours(folder: Path, weights: Sequence[Path]) -> bool:
    if (folder / INDEX).exists():
        try:
            return "_penstock" in read_object(folder / INDEX)
        except CheckpointError:
            return False
    ends = ("", NEW_SUFFIX, PROGRESS_SUFFIX)
    return any(path.with_name(path.name + end).exists() for path in weights for end in ends)
