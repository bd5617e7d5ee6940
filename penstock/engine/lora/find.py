"""Where a LoRA lies that is given by its name alone: under the folders of a ComfyUI root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from penstock.engine.files.folders import weight_files
from penstock.engine.lora.file import Lora
from penstock.errors import CheckpointError


def found_in(lora: Lora, folders: Sequence[Path]) -> Lora:
    """Return ``lora`` with its place: a path that exists as it is, else a name under one of
    ``folders``.

    The first folder that holds it counts, as in ComfyUI; a bare name is looked for in their
    subfolders too.

    Raises:
        CheckpointError: a bare name that files of several subfolders bear; a name that is in none
            of ``folders``, where there are some.
    """
    path = lora.path.expanduser()
    here = next((folder / path for folder in folders if (folder / path).is_file()), None)
    if path.exists() or path.is_absolute() or here is not None:
        return replace(lora, path=path if path.exists() or here is None else here)
    files = [file for folder in folders for file in weight_files(folder)]
    deeper = [file for file in files if file.name == path.name]
    if folders and (len(path.parts) > 1 or not deeper):
        raise _nowhere(path, folders, [file.name for file in files])
    if not folders:
        return replace(lora, path=path)
    if len({file.resolve() for file in deeper}) > 1:
        raise CheckpointError(
            f"more than one LoRA is called {path}",
            expected="one, or its subfolder with it",
            found=", ".join(str(file) for file in deeper),
        )
    return replace(lora, path=deeper[0])


def _nowhere(path: Path, folders: Sequence[Path], names: Sequence[str]) -> CheckpointError:
    near = get_close_matches(path.name, names)
    return CheckpointError(
        f"{path} does not exist",
        expected="a LoRA's .safetensors, here or in " + ", ".join(map(str, folders)),
        found=", ".join(near) if near else None,
        remedy="Check the name." if near else "Check the path.",
    )
