"""What lies beside the packs: configs, tokenizer, scheduler, and last the index, which makes the
folder a model in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock._version import __version__
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import ModelSource
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.store.durable import FileOps, storing, write_atomically
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import TensorEntry

INDEX = "model_index.json"
_LARGEST_BYTES = 64 << 20


def write_side_files(
    source: ModelSource, folder: Path, about: Mapping[str, Any], ops: FileOps
) -> None:
    """Write everything but the packs, each file atomically, the index last.

    Args:
        about: what the index says of the packs: their format, what was merged into them.

    Raises:
        CheckpointError: the tokenizer cannot be read.
        StorageError: the disk is full or fails.
    """
    for name, content in side_files(source, about):
        path = folder / name
        with storing(ops, path, len(content)):
            ops.mkdir(path.parent)
        write_atomically(ops, path, [content])


def write_config(component: ComponentSource, folder: Path, ops: FileOps) -> None:
    """Write a component's config.json beside its pack, atomically.

    Raises:
        StorageError: the disk is full or fails.
    """
    path = folder / component.component / "config.json"
    content = as_json(_config(component))
    with storing(ops, path, len(content)):
        ops.mkdir(path.parent)
    write_atomically(ops, path, [content])


def side_files(source: ModelSource, about: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file beside the packs, in the order they are written."""
    for component in source.components():
        yield f"{component.component}/config.json", as_json(_config(component))
    yield "scheduler/scheduler_config.json", as_json(source.scheduler)
    if "image_encoder" in source.parts:
        yield "image_processor/preprocessor_config.json", as_json(source.image_processor)
    text = source.parts.get("text_encoder")
    if text is not None and "vision_config" in text.config:  # transformers' word: it sees
        yield "processor/preprocessor_config.json", as_json(source.image_processor)
    if source.defaults:
        yield "defaults.json", as_json(source.defaults)
    for name, content in _tokenizer(source.tokenizer):
        yield f"tokenizer/{name}", content
    yield INDEX, as_json(_index(source, about))


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return ``value`` as the text of a file; the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _config(component: ComponentSource) -> dict[str, Any]:
    config, kind = dict(component.config), component.kind
    if kind.model_type is not None:
        return config | {"model_type": kind.model_type}
    return config | {"_class_name": kind.made_by[1]}


def _index(source: ModelSource, about: Mapping[str, Any]) -> dict[str, Any]:
    configs = {name: part.config for name, part in source.parts.items()}
    pipeline = source.family.pipeline(configs)
    parts = {name: list(part.kind.made_by) for name, part in source.parts.items()}
    made = {"version": __version__, **about}
    return {"_class_name": pipeline, "_penstock": made, **source.pipeline, **parts}


def _tokenizer(tokenizer: Path | TensorEntry) -> Iterator[tuple[str, bytes]]:
    if isinstance(tokenizer, Path) and tokenizer.is_dir():
        for path in sorted(tokenizer.iterdir()):
            if path.is_file() and path.suffix in (".json", ".model", ".txt"):
                yield path.name, _small(path)
        return
    content, marks = Tokenizer(tokenizer).written()
    yield "tokenizer.json", content.encode()
    yield "tokenizer_config.json", as_json({"tokenizer_class": "PreTrainedTokenizerFast", **marks})


def _small(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_BYTES:
        raise CheckpointError(
            f"{path} is not a tokenizer file",
            expected="64 MiB at most",
            found=f"{path.stat().st_size}",
        )
    return path.read_bytes()
