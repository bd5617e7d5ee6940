"""What the parameters of a file compute with: the formats of its linears, a dtype, plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from penstock.engine.files.keys import ComponentSource, packed_facts
from penstock.engine.files.storage import StoredWeight
from penstock.errors import CheckpointError
from penstock.formats.formats import QuantFormat
from penstock.formats.scaled import Scaled8

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SINGLE = {"F64": "F32"}
"""What is computed in where values are stored in more."""

_TABLES = (
    "shared.weight",
    "relative_attention_bias.weight",
    "position_embedding.weight",
)
"""Ends of the names of tables that are looked up, not multiplied with."""


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the parameter is the weight of a linear layer (and so may stay quantised)."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(_TABLES)


def linear_formats(source: ComponentSource) -> dict[str, QuantFormat]:
    """Return the format of each linear layer that is stored quantised, by its module's name."""
    shapes = source.shapes
    return {
        name.removesuffix(".weight"): stored.format
        for name, stored in source.weights.items()
        if not stored.plain and is_linear(name, shapes[name])
    }


def compute_tag(source: ComponentSource) -> str:
    """Safetensors tag of the dtype to compute in: that of most plain matrices, else BF16.

    GGUF files keep their few plain tensors in F32 and 8-bit files some in F32: that says nothing of
    the dtype the model was made for, so F32 counts only where nothing is quantised; nor do
    parameters count that are computed with in F32 in any case. F64 is read and computed in as F32.
    A pack says what its source computed in.

    Raises:
        CheckpointError: the pack's metadata are damaged.
    """
    packed = packed_facts(source.raw).get("compute")
    if packed is not None:
        return _known_tag(source, packed)
    sizes: dict[str, int] = {}
    for name, stored in source.weights.items():
        if source.kind.keeps_single(name):
            continue
        if stored.plain and len(stored.shape or ()) > 1:
            tag = _SINGLE.get(stored.tensors["weight"].dtype, stored.tensors["weight"].dtype)
            sizes[tag] = sizes.get(tag, 0) + stored.nbytes
    if any(not stored.plain for stored in source.weights.values()):
        sizes.pop("F32", None)
    return max(sizes, key=lambda tag: sizes[tag], default="BF16")


def _known_tag(source: ComponentSource, tag: object) -> str:
    if tag not in ("BF16", "F16", "F32"):
        raise CheckpointError(
            f"{source.raw.path} has damaged metadata",
            expected="BF16, F16 or F32 to compute in",
            found=repr(tag),
        )
    return str(tag)


def decode(
    stored: StoredWeight,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Return plain values of one parameter from its stored tensors.

    Raises:
        CheckpointError: it has no rows and columns and yet a quantised storage.
    """
    raw = isinstance(stored.format, Scaled8) and stored.format.scale == "none"
    if stored.plain or (raw and len(shape) != 2):
        return tensors["weight"].to(dtype)
    if len(shape) != 2:
        raise CheckpointError(
            f"{stored.name} is quantised and is no matrix",
            expected="a plain tensor",
            found=f"{stored.label} of shape {list(shape)}",
            remedy="Use another file of this model.",
        )
    from penstock.quant.arithmetic import dequantise

    return dequantise(stored.format, tensors, (shape[0], shape[1]), dtype)
