"""A weight in any format, with LoRAs that need its values: decoded, changed, and then multiplied.

They are computed anew for each product, in the scratch buffer that quantised weights are decoded
into, so that they take no memory a block; `penstock pack --lora` computes them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.errors import UsageError
from penstock.quant.format import QuantFormat
from penstock.quant.patch import Patch
from penstock.quant.rows import Shape, Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Patched:
    """A `QuantFormat` whose values are those of ``base``, changed by ``patches`` in their order.

    Attributes:
        base: how the weight itself is stored.
        patches: their tensors lie beside it.
    """

    base: QuantFormat
    patches: tuple[Patch, ...]

    @property
    def name(self) -> str:
        """The base's, and that there is something beside it."""
        return f"{self.base.name}+lora"

    def fits(self, shape: Shape) -> bool:
        """As the base."""
        return self.base.fits(shape)

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """The base's tensors, and the LoRAs'."""
        stored = self.base.storage(shape, compute_dtype)
        for patch in self.patches:
            stored |= patch.storage()
        return stored

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """The most of decoding and of each change: one comes after the other."""
        changes = (patch.workspace_bytes(shape, device) for patch in self.patches)
        return max(self.base.workspace_bytes(shape, device), *changes)

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Refused: it is how a weight is read.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{name} cannot be stored as {self.name}", expected=self.base.name)

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The base's values, changed in fp32 and rounded to ``dtype`` once a LoRA."""
        from penstock.quant.values.patch import apply
        from penstock.quant.values.tensors import output

        device = next(iter(tensors.values())).device
        weight = self.base.dequantise(tensors, shape, dtype, output(out, shape, dtype, device))
        for patch in self.patches:
            apply(patch, weight, {role: tensors[patch.name(role)] for role in patch.roles})
        return weight
