"""The arithmetic of `penstock.formats.plain`: casts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.formats.plain import Plain
from penstock.formats.rows import Shape
from penstock.quant.values.tensors import DTYPES, output, row_amax


def quantise(fmt: Plain, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Return ``weight`` cast.

    Raises:
        CheckpointError: the dtype cannot hold a value.
    """
    row_amax(weight, name)
    stored = weight.to(DTYPES[fmt.tag])
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"{name} cannot be stored as {fmt.name}",
            expected=f"magnitudes up to {torch.finfo(stored.dtype).max:g}",
            found=f"{weight.abs().max().item():g}",
            remedy="Choose bf16 or fp32",
        )
    return {"weight": stored}


def dequantise(
    fmt: Plain,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight itself if it has ``dtype`` already and no ``out`` is given, else a cast."""
    weight = tensors["weight"]
    if out is None and weight.dtype == dtype:
        return weight
    return output(out, shape, dtype, weight.device).copy_(weight)
