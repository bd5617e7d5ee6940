"""Weights that are stored as they are: bf16, fp16, fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.quant.rows import DTYPES, Shape, Spec, output, row_amax


@dataclass(frozen=True)
class Plain:
    """A floating-point weight without scales; ``tag`` is its safetensors dtype."""

    name: str
    tag: str

    def fits(self, shape: Shape) -> bool:
        """Every shape can be stored."""
        return True

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """One tensor, whatever the compute dtype."""
        return {"weight": (self.tag, shape)}

    def workspace_bytes(self, shape: Shape, device: torch.device) -> int:
        """Nothing beside the output."""
        return 0

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Casts ``weight``.

        Raises:
            CheckpointError: NaN or Inf, or a value that the dtype cannot hold.
        """
        row_amax(weight, name)
        stored = weight.to(DTYPES[self.tag])
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointError(
                f"{name} cannot be stored as {self.name}",
                expected=f"magnitudes up to {torch.finfo(stored.dtype).max:g}",
                found=f"{weight.abs().max().item():g}",
                remedy="Choose bf16 or fp32",
            )
        return {"weight": stored}

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The weight itself if it has ``dtype`` already and no ``out`` is given, else a cast."""
        weight = tensors["weight"]
        if out is None and weight.dtype == dtype:
            return weight
        return output(out, shape, dtype, weight.device).copy_(weight)
