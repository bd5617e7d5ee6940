"""How the weights of a file are stored: the tensors of each weight gathered under its name.

Free of torch, so that a file can be described without it; `penstock.engine.files.formats` turns a
storage into the `QuantFormat` that computes with it. Sources of the spellings: ComfyUI's quantised
layers (``comfy_quant``, ``_quantization_metadata``, and the older ``scaled_fp8`` mark), LightX2V,
optimum-quanto as Wan2GP saves it, ComfyUI-GGUF.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from penstock.engine.files.fields import parse_object
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import TensorEntry
from penstock.offload.gguf import PREFIX as GGUF
from penstock.offload.gguf import block_size

COMFY_MARK = "scaled_fp8"
COMFY_METADATA = "_quantization_metadata"
PADDING = "__pad__."
PACK_METADATA = "penstock"

_SUFFIX = re.compile(
    r"(.+)\.(weight\._data\._data|weight\._data|weight\._scale|weight\._shift|weight_scale_2"
    r"|weight_scale|scale_weight|weight_absmax|scale_input|input_scale|output_scale|comfy_quant"
    r"|weight)"
)
_DATA = ("weight", "weight._data", "weight._data._data")
_UNUSED = ("scale_input", "input_scale", "output_scale", "comfy_quant")
_ALIASES = MappingProxyType({"scale_weight": "weight_scale"})
_PLAIN = MappingProxyType({"BF16": "bf16", "F16": "fp16", "F32": "fp32"})


@dataclass(frozen=True)
class StoredWeight:
    """One weight (or another parameter) of a file.

    Attributes:
        name: the parameter's name with diffusers or transformers ("blocks.0.attn1.to_q.weight").
        tensors: the stored tensors that computing needs, by suffix in the spelling of the formats
            ("weight", "weight_scale", ...).
        label: the storage for people: "bf16", "fp8 scaled", "gguf-q8_0".
        shape: the logical shape; None where only the model's config tells it (4-bit quanto).
        comfy: the layer's entry in ComfyUI's quantisation metadata.
        full_precision: the file forbids 8-bit matrix products.
    """

    name: str
    tensors: Mapping[str, TensorEntry]
    label: str
    shape: tuple[int, ...] | None
    comfy: Mapping[str, Any] = field(default_factory=dict)
    full_precision: bool = False

    @property
    def plain(self) -> bool:
        """Whether the bytes are the values, in a floating-point type that computes."""
        return self.label in _PLAIN.values()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether this can be a weight of ``shape``."""
        if self.shape is not None:
            return self.shape == shape
        packed = self.tensors["weight._data._data"]
        return len(shape) == 2 and packed.nbytes == math.prod(shape) / 2


def gather(
    entries: Mapping[str, TensorEntry],
    metadata: Mapping[str, Any],
    read: Callable[[TensorEntry], bytes],
    prefix: str = "",
) -> dict[str, StoredWeight]:
    """Group renamed ``entries`` by parameter.

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
        gathered[name] = _stored(name, tensors, config, full_precision)
    return gathered


def _by_parameter(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    grouped: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        if key == COMFY_MARK:
            continue
        match = _SUFFIX.fullmatch(key)
        name, suffix = (f"{match[1]}.weight", match[2]) if match else (key, "weight")
        grouped.setdefault(name, {})[suffix] = entry
    return grouped


def _layer(tensors: Mapping[str, TensorEntry]) -> str:
    """The layer's name in the file itself."""
    name = next(iter(tensors.values())).name
    match = _SUFFIX.fullmatch(name)
    return match[1] if match else name


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
    if entry is None:
        return known or {}
    if entry.nbytes > 65536:
        raise CheckpointError(
            f"{entry.name} cannot be used",
            expected="a short JSON text",
            found=f"{entry.nbytes} bytes",
        )
    return parse_object(read(entry), entry.name)


def _stored(
    name: str, tensors: Mapping[str, TensorEntry], comfy: Mapping[str, Any], full_precision: bool
) -> StoredWeight:
    used = {_ALIASES.get(key, key): e for key, e in tensors.items() if key not in _UNUSED}
    data = next((used[key] for key in _DATA if key in used), None)
    if data is None:
        first = next(iter(tensors.values()))
        raise CheckpointError(
            f"{name} has a scale and no weight", expected=f"a tensor {name}", found=first.name
        )
    _refuse_comfy(data.name, comfy)
    label = _label(data, used)
    return StoredWeight(
        name=name,
        tensors=MappingProxyType(used),
        label=label,
        shape=_logical(label, data.shape),
        comfy=comfy,
        full_precision=full_precision or bool(comfy.get("full_precision_matrix_mult")),
    )


def _logical(label: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if label == "quanto-int4":
        return None
    return (shape[0], 2 * shape[1]) if label == "nf4" else shape


def _refuse_comfy(name: str, comfy: Mapping[str, Any]) -> None:
    kind = comfy.get("format", "float8_e4m3fn")
    if kind not in ("float8_e4m3fn", "int8_tensorwise") or comfy.get("convrot"):
        raise CheckpointError(
            f"{name} is quantised in a way that penstock does not read",
            expected="float8_e4m3fn, or int8_tensorwise without convrot",
            found=f"{kind}{' with convrot' if comfy.get('convrot') else ''}",
            remedy="Use the same model's bf16, fp8 or GGUF file.",
        )


def _label(data: TensorEntry, used: Mapping[str, TensorEntry]) -> str:
    if data.dtype.startswith(GGUF):
        if data.shape[-1] % block_size(data.dtype)[0]:
            raise _unreadable(data, "rows that are not whole blocks")
        return "gguf-" + data.dtype.removeprefix(GGUF).lower()
    if set(used) == {"weight"} and data.dtype in _PLAIN:
        return _PLAIN[data.dtype]
    kind = {"F8_E4M3": "fp8", "I8": "int8"}.get(data.dtype)
    if kind is not None and set(used) == {"weight._data", "weight._scale"}:
        return f"quanto-{kind}"
    if kind is not None and set(used) == {"weight", "weight_scale"}:
        whole = math.prod(used["weight_scale"].shape) == 1
        rows = "per tensor" if whole else "per row"
        return f"{kind} {rows}"
    if kind == "fp8" and len(used) == 1:
        return "fp8 raw"
    if set(used) == {"weight._data._data", "weight._scale", "weight._shift"}:
        return "quanto-int4"
    if set(used) == {"weight", "weight_absmax"} and data.dtype == "U8" and len(data.shape) == 2:
        return "nf4"
    raise _unreadable(data, ", ".join(f"{k} {e.dtype}{list(e.shape)}" for k, e in used.items()))


def _unreadable(data: TensorEntry, found: str) -> CheckpointError:
    return CheckpointError(
        f"{data.name} is stored in a way that penstock does not read",
        expected="bf16, fp16, fp32, fp8 e4m3, int8 with scales, quanto, nf4 or GGUF",
        found=found,
        remedy="Use the same model's bf16, fp8 e4m3 or GGUF file.",
    )
