"""Folders of model files as ComfyUI reads them: its own under ``models/``, and those that
``extra_model_paths.yaml`` adds.

Source: ComfyUI's ``folder_paths.py`` (links are followed, ``.git`` is not entered, the first folder
that holds a name wins) and ``utils/extra_config.py`` (``~`` and ``$VAR`` in base_path, places
relative to the file, ``is_default``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from penstock.errors import CheckpointError
from penstock.offload.shards import heads
from penstock.regular import read_regular

COMFY_FOLDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "transformer": ("diffusion_models", "unet"),
        "text_encoder": ("text_encoders", "clip"),
        "vae": ("vae",),
        "image_encoder": ("clip_vision",),
        "audio_vae": ("vae", "audio_vae"),
        "loras": ("loras",),
    }
)
EXTRA_PATHS = "extra_model_paths.yaml"
_SHOWN = 200
_MAX_YAML_BYTES = 256 << 10
SUFFIXES = (".safetensors", ".sft", ".gguf")


def comfy_root(folder: Path) -> Path | None:
    """Return where under ``folder`` ComfyUI's folders are; None: it is no root of ComfyUI's."""
    for root in (folder / "models", folder):
        if any((root / name).is_dir() for name in COMFY_FOLDERS["transformer"]):
            return root
    # All models may lie where its extra paths say.
    return folder / "models" if (folder / EXTRA_PATHS).exists() else None


def comfy_folders(folder: Path, root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the folders of each component, and of "loras", in the order in which they are
    searched.

    Args:
        folder: what was given: a ComfyUI, or its folder of models, ``root``.

    Raises:
        CheckpointError: extra_model_paths.yaml cannot be read.
    """
    roots = {name: [root / sub for sub in subs] for name, subs in COMFY_FOLDERS.items()}
    files = (base / EXTRA_PATHS for base in (folder, root.parent))
    extra = next((path for path in files if path.exists()), None)
    for name, place, first in () if extra is None else _extra_paths(extra):
        roots[name].insert(0 if first else len(roots[name]), place)
    return {name: tuple(dict.fromkeys(places)) for name, places in roots.items()}


def weight_files(folder: Path) -> list[Path]:
    """Return the weights in ``folder`` and its subfolders, linked ones too; what cannot be listed,
    and links that lead back, are passed over. Of shards the first stands for all."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name != ".git")
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in SUFFIXES]
    return heads(sorted(found))


def _extra_paths(path: Path) -> list[tuple[str, Path, bool]]:
    """Return the component, folder, and whether it comes first, of each entry of
    extra_model_paths.yaml."""
    import yaml

    try:
        content = yaml.safe_load(_small_text(path)) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read",
            expected="ComfyUI's extra paths in YAML",
            found=" ".join(str(error).split())[:_SHOWN],
        ) from error
    values = content.values() if isinstance(content, dict) else ()
    sections = [section for section in values if isinstance(section, dict)]
    return [entry for section in sections for entry in _section(path.parent, section)]


def _section(folder: Path, section: Mapping[str, Any]) -> Iterator[tuple[str, Path, bool]]:
    base = folder / _expanded(_text(section, "base_path"))
    for component, names in COMFY_FOLDERS.items():
        for name in names:
            for line in _text(section, name).splitlines():
                if line.strip():
                    yield component, base / _expanded(line.strip()), bool(section.get("is_default"))


def _expanded(text: str) -> Path:
    """Expand its ``~`` and its ``$VAR``."""
    return Path(os.path.expandvars(os.path.expanduser(text)))  # noqa: PTH111


def _text(section: Mapping[Any, Any], name: str) -> str:
    """Return an entry that is a text; what else it may be (aliases can unfold without end) is no
    path."""
    value = section.get(name)
    return value if isinstance(value, str) and "\0" not in value else ""


def _small_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_YAML_BYTES:
        raise ValueError(f"{size:,} bytes, and {_MAX_YAML_BYTES:,} are the most")
    return read_regular(path).decode("utf-8")
