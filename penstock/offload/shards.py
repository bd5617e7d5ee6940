"""Shards of one checkpoint by their names alone: ``name-00002-of-00007.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from penstock.errors import CheckpointError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")
_MOST = 2000
_SHOWN = 5


def shard_set(path: Path) -> list[Path]:
    """Return the files of the set that ``path`` is a shard of, in order; ``[path]`` if it is
    none."""
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MOST:
        return [path]
    stem, _, count, suffix = match.groups()
    return [
        path.with_name(f"{stem}-{number:05}-of-{count}{suffix}")
        for number in range(1, int(count) + 1)
    ]


def is_shard(path: Path) -> bool:
    """Return whether ``path`` is named as one of several."""
    return _SHARD.fullmatch(path.name) is not None


def heads(paths: Sequence[Path]) -> list[Path]:
    """Return ``paths`` without the shards whose set's first one is among them: it stands for them
    all."""
    known = {*paths}
    return [path for path in paths if (first := shard_set(path)[0]) == path or first not in known]


def one_set(names: Sequence[str]) -> bool:
    """Return whether all ``names`` are shards of one set."""
    matches = [_SHARD.fullmatch(name) for name in names]
    return bool(names) and len({m and (m[1], m[3]) for m in matches}) == 1 and None not in matches


def check_complete(path: Path, files: Sequence[Path]) -> None:
    """Refuse a set of which some are missing.

    Raises:
        CheckpointError: names them.
    """
    missing = [file for file in files if not file.exists()]
    if not missing:
        return
    links = [file for file in missing if file.is_symlink()]
    shown = ", ".join(file.name for file in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    raise CheckpointError(
        f"{path}: download incomplete",
        expected=f"{len(files)} files",
        found=f"{len(files) - len(missing)}. No such file: {shown}{more}"
        + (f" ({len(links)} of them are links to nothing)" if links else ""),
        remedy="Finish the download.",
    )
