"""Whose a folder of diffusers is: a family's of penstock's own, or nobody's. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.engine.family.protocol import families
from penstock.engine.files.fields import parse_object
from penstock.errors import CheckpointError
from penstock.offload.files import looked_at
from penstock.regular import open_regular

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
_LARGEST_INDEX = 1 << 20


def is_foreign(path: Path) -> bool:
    """Return whether ``path`` is a folder of diffusers that no family of penstock's own runs."""
    index = index_of(path)
    if index is None:
        return False
    for family in families():
        try:
            family.check_pipeline(path, index)
        except CheckpointError:
            continue
        return False
    return True


def index_of(folder: Path) -> dict[str, Any] | None:
    """Return what the index in ``folder`` says; None: there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    for name in (INDEX, MODULAR_INDEX):
        path = folder / name
        if path.is_file():
            with looked_at(path), open_regular(path) as file:
                return parse_object(file.read(_LARGEST_INDEX), str(path))
    return None
