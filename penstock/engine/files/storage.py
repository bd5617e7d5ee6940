"""How the weights of a file are stored: the tensors of each weight gathered under its name.

Free of torch, so that a file can be described without it. Beside the tensors of a weight, whose
spellings `penstock.formats.recognise` knows, ComfyUI's metadata say how it is stored
(``comfy_quant``, ``_quantization_metadata``, and the older ``scaled_fp8`` mark).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from penstock.engine.files.fields import parse_object
from penstock.errors import CheckpointError
from penstock.formats.formats import QuantFormat
from penstock.formats.gguf import PREFIX as GGUF
from penstock.formats.gguf import block_size
from penstock.formats.recognise import (
    STATES,
    ZERO_POINT,
    canonical_suffix,
    recognise,
    split_suffix,
)
from penstock.formats.rows import Spec
from penstock.offload.checkpoint import TensorEntry

COMFY_MARK = "scaled_fp8"
COMFY_METADATA = "_quantization_metadata"
PADDING = "__pad__."
PACK_METADATA = "penstock"

_DATA = ("weight", "weight._data", "weight._data._data")


@dataclass(frozen=True)
class StoredWeight:
    """One weight (or another parameter) of a file.

    Attributes:
        name: the parameter's name with diffusers or transformers ("blocks.0.attn1.to_q.weight").
        tensors: the stored tensors that computing needs, by suffix in the spelling of the formats
            ("weight", "weight_scale", ...).
        format: what reads them.
        shape: the logical shape, padded where the format pads; None where only the model's config
            tells it (4-bit quanto).
    """

    name: str
    tensors: Mapping[str, TensorEntry]
    format: QuantFormat
    shape: tuple[int, ...] | None

    @property
    def label(self) -> str:
        """The storage for people: "bf16", "fp8 per row", "gguf-q8_0"."""
        return self.format.label

    @property
    def plain(self) -> bool:
        """Whether the bytes are the values, in a floating-point type that computes."""
        return self.format.plain

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype tag and shape of the stored tensors, as bytes lie."""
        entries = {suffix: as_bytes(entry) for suffix, entry in self.tensors.items()}
        return {suffix: (entry.dtype, entry.shape) for suffix, entry in entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Return whether this can be a weight of ``shape``."""
        if self.shape == shape or len(shape) != 2:
            return self.shape == shape
        matrix = (shape[0], shape[1])
        return self.format.fits(matrix) and self.format.storage(matrix, "") == self.specs


def as_bytes(entry: TensorEntry) -> TensorEntry:
    """Return an entry of GGUF blocks as rows of bytes; others as they are."""
    if not entry.dtype.startswith(GGUF):
        return entry
    block, nbytes = block_size(entry.dtype)
    *rows, columns = entry.shape
    return replace(entry, dtype="U8", shape=(*rows, columns // block * nbytes))


def gather(
    entries: Mapping[str, TensorEntry],
    metadata: Mapping[str, Any],
    read: Callable[[TensorEntry], bytes],
    prefix: str = "",
) -> dict[str, StoredWeight]:
    """Return the group renamed ``entries`` by parameter.

    Args:
        entries: by new name, storage suffixes kept; each knows the file's own name.
        metadata: of the file's header.
        read: the bytes of a small tensor.
        prefix: what the file puts before every name; ComfyUI's metadata may leave it out.

    Raises:
        CheckpointError: a storage that penstock does not read; names the layer.
    """
    full_precision = COMFY_MARK in entries and math.prod(entries[COMFY_MARK].shape) == 2
    comfy = _comfy_layers(metadata)
    gathered: dict[str, StoredWeight] = {}
    for name, tensors in _by_parameter(entries).items():
        layer = _layer(tensors)
        known = comfy.get(layer) or comfy.get(layer.removeprefix(prefix))
        config = _comfy_config(tensors, known, read)
        gathered[name] = _stored(name, tensors, config, full_precision, read)
    return gathered


def _by_parameter(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    grouped: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        if key == COMFY_MARK:
            continue
        split = split_suffix(key)
        name, suffix = (f"{split[0]}.weight", split[1]) if split else (key, "weight")
        grouped.setdefault(name, {})[suffix] = entry
    return grouped


def _layer(tensors: Mapping[str, TensorEntry]) -> str:
    """Return the layer's name in the file itself."""
    name = next(iter(tensors.values())).name
    split = split_suffix(name)
    return split[0] if split else name


def _comfy_layers(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    text = metadata.get(COMFY_METADATA)
    if text is None:
        return {}
    return _layers(parse_object(str(text), COMFY_METADATA))


def _layers(value: Mapping[str, Any]) -> Mapping[str, Any]:
    layers = value.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise CheckpointError(
            f"{COMFY_METADATA} cannot be used",
            expected="an object of layers",
            found=repr(layers)[:80],
        )
    return layers


def _comfy_config(
    tensors: Mapping[str, TensorEntry],
    known: Mapping[str, Any] | None,
    read: Callable[[TensorEntry], bytes],
) -> Mapping[str, Any]:
    entry = tensors.get("comfy_quant")
    return known or {} if entry is None else _described(entry, read)


def _described(entry: TensorEntry, read: Callable[[TensorEntry], bytes]) -> dict[str, Any]:
    """Return the JSON object that a byte tensor holds."""
    return parse_object(_short(entry, read), entry.name)


def _short(entry: TensorEntry, read: Callable[[TensorEntry], bytes]) -> bytes:
    if entry.nbytes > 1 << 20:
        raise CheckpointError(
            f"{entry.name} cannot be used",
            expected="a short tensor",
            found=f"{entry.nbytes} bytes",
        )
    return read(entry)


def _stored(
    name: str,
    tensors: Mapping[str, TensorEntry],
    comfy: Mapping[str, Any],
    full_precision: bool,
    read: Callable[[TensorEntry], bytes],
) -> StoredWeight:
    used = {
        known: entry
        for suffix, entry in tensors.items()
        if (known := canonical_suffix(suffix)) is not None
    }
    data = next((used[suffix] for suffix in used if suffix in _DATA), None)
    if data is None:
        first = next(iter(tensors.values()))
        raise CheckpointError(
            f"{name} has a scale and no weight", expected=f"a tensor {name}", found=first.name
        )
    if ZERO_POINT in tensors:
        _check_symmetric(tensors[ZERO_POINT], read)
    state = next((_described(tensors[each], read) for each in STATES if each in tensors), None)
    found = recognise(
        {suffix: (entry.dtype, entry.shape) for suffix, entry in tensors.items()},
        layer=data.name,
        comfy=comfy,
        full_precision=full_precision,
        state=state,
    )
    shape = found.logical(data.shape) if state is None else tuple(state["shape"])
    return StoredWeight(name, MappingProxyType(used), found, shape)


def _check_symmetric(zeros: TensorEntry, read: Callable[[TensorEntry], bytes]) -> None:
    if any(_short(zeros, read)):
        raise CheckpointError(
            f"{zeros.name} moves the weights' zero, which penstock does not read",
            expected="torchao's symmetric int8, or fp8",
            found="zero points that are not 0",
            remedy="Use the same model's bf16, fp8 or GGUF file.",
        )
