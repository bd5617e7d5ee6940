"""A weight in any format, with LoRAs that need its values: decoded, changed, and then multiplied.

They are computed anew for each product, in the scratch buffer that quantised weights are decoded
into, so that they take no memory a block; `penstock pack --lora` computes them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.formats.formats import QuantFormat
from penstock.formats.patch import Patch
from penstock.formats.rows import Shape, Spec


@dataclass(frozen=True)
class Patched:
    """A `QuantFormat` whose values are those of ``base``, changed by ``patches`` in their order.

    Attributes:
        base: how the weight itself is stored.
        patches: their tensors lie beside it.
    """

    base: QuantFormat
    patches: tuple[Patch, ...]

    plain: ClassVar[bool] = False
    writable: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    gemm: ClassVar[None] = None

    @property
    def name(self) -> str:
        """The base's, and that there is something beside it."""
        return f"{self.base.name}+lora"

    @property
    def label(self) -> str:
        """The same for people."""
        return f"{self.base.label}+lora"

    def fits(self, shape: Shape) -> bool:
        """As the base."""
        return self.base.fits(shape)

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...] | None:
        """As the base."""
        return self.base.logical(data)

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return the base's tensors, and the LoRAs'."""
        stored = self.base.storage(shape, compute_dtype)
        for patch in self.patches:
            stored |= patch.storage()
        return stored

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return the most of decoding and of each change: one comes after the other."""
        changes = (patch.workspace_bytes(shape, device) for patch in self.patches)
        return max(self.base.workspace_bytes(shape, device), *changes)
