"""Weights that are stored as they are: bf16, fp16, fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.quant.rows import Shape, Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Nothing beside the output."""
        return 0

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Casts ``weight``.

        Raises:
            CheckpointError: NaN or Inf, or a value that the dtype cannot hold.
        """
        from penstock.quant.values import plain

        return plain.quantise(self, weight, name)

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The weight itself if it has ``dtype`` already and no ``out`` is given, else a cast."""
        from penstock.quant.values import plain

        return plain.dequantise(self, tensors, shape, dtype, out)
