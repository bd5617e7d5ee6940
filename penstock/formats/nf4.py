"""NF4 as bitsandbytes stores it: two 4-bit codes a byte and an fp32 absolute maximum a block.

Source: `bitsandbytes.functional.quantize_4bit` with ``quant_type="nf4"`` and without nested
statistics; the code is the NormalFloat of QLoRA (arXiv:2305.14314). Its tensors are flat; here
they are shaped by the weight's rows, which are the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.formats.rows import Shape, Spec, chunk_rows


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat in blocks of ``block`` elements along a row.

    A row's length must be a multiple of ``block``: blocks then never straddle rows. Weights
    that are not are kept plain when a model is packed.
    """

    name: str = "nf4"
    block: int = 64

    plain: ClassVar[bool] = False
    writable: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    gemm: ClassVar[None] = None

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def fits(self, shape: Shape) -> bool:
        """Whether rows are whole blocks."""
        return shape[1] % self.block == 0

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """Two numbers a byte."""
        return (data[0], 2 * data[1])

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Packed codes (the first of a pair in the high bits) and the blocks' maxima."""
        rows, columns = shape
        return {
            "weight": ("U8", (rows, columns // 2)),
            "weight_absmax": ("F32", (rows, columns // self.block)),
        }

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """A decoded chunk (fp32 at most), where only the operator can decode on a CPU; all other
        ways decode into the output."""
        return 0 if device == "cuda" else 4 * shape[1] * chunk_rows(*shape, device)
