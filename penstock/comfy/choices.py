"""What can be chosen: files in the folders that ComfyUI knows, by `folder_paths`."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

from penstock.engine.files.folders import weight_files

NONE = "none"
"""The first choice: nothing."""

FOLDERS = MappingProxyType(
    {
        "transformer": ("diffusion_models", "unet_gguf"),
        "transformer_2": ("diffusion_models", "unet_gguf"),
        "text_encoder": ("text_encoders", "clip_gguf"),
        "vae": ("vae",),
        "image_encoder": ("clip_vision",),
        "audio_vae": ("vae", "audio_vae"),
        "lora": ("loras",),
    }
)
"""ComfyUI's types of folders where a part may lie; "unet" and "clip" are older names of the first
ones, which ComfyUI itself maps. The types for GGUF are those of a widely used node pack."""

_GGUF = ".gguf"


def choices(part: str) -> list[str]:
    """Return what a user may choose for ``part``: `NONE`, then names as ComfyUI shows them, and
    what it hides under its own types: .gguf."""
    paths = _folder_paths()
    names: dict[str, None] = {}
    for kind in _known(part):
        found = {*paths.get_filename_list(kind), *_hidden(kind)}
        names |= dict.fromkeys(sorted(found, key=str.lower))
    return [NONE, *names]


def path_of(part: str, name: str | None) -> Path | None:
    """Return the file of a choice; None: nothing was chosen.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    if name is None or name == NONE:
        return None
    for kind in _known(part):
        found = _folder_paths().get_full_path(kind, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(
        f"{name} is in none of ComfyUI's folders for {' and '.join(_known(part))}"
    )


def stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells that a file is another one."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _known(part: str) -> list[str]:
    return [kind for kind in FOLDERS[part] if kind in _folder_paths().folder_names_and_paths]


def _hidden(kind: str) -> set[str]:
    return {
        os.path.relpath(path, root)
        for root in _folder_paths().get_folder_paths(kind)
        for path in weight_files(Path(root))
        if path.suffix.lower() == _GGUF
    }


def _folder_paths() -> Any:
    import folder_paths

    return folder_paths
