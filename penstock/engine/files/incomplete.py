"""Parts that a diffusers folder names and does not hold: a download that did not end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.engine.files.fields import read_object
from penstock.engine.files.folders import SUFFIXES
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import PICKLES

_SHOWN = 6


def check_whole(path: Path, index: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Refuse a folder of which files are missing.

    Args:
        path: of its index, model_index.json or modular_model_index.json.
        index: what that says.
        parts: those that must come from here, if the index names them.

    Raises:
        CheckpointError: names them.
    """
    folder = path.parent
    wanted = [part for part in parts if _is_named(index.get(part))]
    missing = [text for part in wanted for text in _told(folder, part)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(
            f"{folder}: download incomplete",
            expected=f"the parts that {path} names",
            found=f"these are missing: {', '.join(missing[:_SHOWN])}{more}",
            remedy="Finish the download (a hub id is fetched again by its name), or give the part "
            "with its own option.",
        )


def _told(folder: Path, part: str) -> list[str]:
    """Return what the part lacks, for people."""
    if not (folder / part).is_dir():
        return [f"no {part.replace('_', ' ')} ({part}/)"]
    return [str(path.relative_to(folder)) for path in _missing(folder / part)]


def _is_named(entry: object) -> bool:
    """Return whether the index has the part: a library and a class, and in a modular one where it
    is from; a part that was left out has nulls."""
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        return False
    return all(isinstance(each, str) for each in entry[:2])


def _missing(folder: Path) -> Iterator[Path]:
    """Yield the files that the part in ``folder`` lacks."""
    entries = list(folder.iterdir())
    links = [path for path in entries if path.is_symlink() and not path.exists()]
    yield from links
    yield from (
        path for path in _shards(folder, entries) if path not in links and not path.exists()
    )
    kinds = {path.suffix for path in entries}
    if folder.name == "tokenizer":
        whole = bool(kinds & {".json", ".model"})
    else:
        whole = bool(kinds & {*SUFFIXES, *PICKLES})  # pickles have their own answer
    if not whole and not any(path.name.endswith(".index.json") for path in entries):
        yield folder / ("*" if folder.name == "tokenizer" else "*.safetensors")


def _shards(folder: Path, entries: list[Path]) -> Iterator[Path]:
    """Yield the shards that an index names; one that cannot be read says so when it is opened."""
    for index in entries:
        if index.name.endswith(".safetensors.index.json") and index.exists():
            try:
                names = read_object(index)["weight_map"].values()
            except (CheckpointError, KeyError, AttributeError):
                continue
            yield from (folder / name for name in sorted(set(filter(_is_name, names))))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name
