"""What can be chosen: files in the folders that ComfyUI knows, by `folder_paths`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
    what it hides: .gguf."""
    names: dict[str, None] = {}
    for kind in _kinds(part):
        names |= dict.fromkeys(_folder_paths().get_filename_list(kind))
    return [NONE, *sorted(names, key=str.lower)]


def path_of(part: str, name: str | None) -> Path | None:
    """Return the file of a choice; None: nothing was chosen.

    Raises:
        FileNotFoundError: it is not there any more.
    """
    if name is None or name == NONE:
        return None
    for kind in _kinds(part):
        found = _folder_paths().get_full_path(kind, name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(f"{name} is in none of ComfyUI's folders for {FOLDERS[part][0]}")


def stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells that a file is another one."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _kinds(part: str) -> Iterator[str]:
    """ComfyUI's types of folders for ``part``, and types of our own for what it hides in these:
    ComfyUI lists and remembers both in its way."""
    known = _folder_paths().folder_names_and_paths
    for kind in FOLDERS[part]:
        if kind in known:
            ours = f"penstock_{kind}"
            known.setdefault(ours, (known[kind][0], {_GGUF}))
            yield from (kind, ours)


def _folder_paths() -> Any:
    import folder_paths

    return folder_paths
