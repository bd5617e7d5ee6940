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

    Attributes:
        flat: shaped as bitsandbytes has it.
        nested_block: so many maxima are 8-bit codes with a maximum of their own, less
            ``nested_offset``; 0: maxima are fp32. (Its "double quantisation"; always flat.)
    """

    name: str = "nf4"
    block: int = 64
    flat: bool = False
    nested_block: int = 0
    nested_offset: float = 0.0

    plain: ClassVar[bool] = False
    writable: ClassVar[bool] = True
    gemm: ClassVar[None] = None

    @property
    def label(self) -> str:
        """Its name, and whether maxima are quantised."""
        return f"{self.name} nested" if self.nested_block else self.name

    @property
    def by_rows(self) -> bool:
        """Whether each row's bytes lie together; those of flat tensors are not looked for."""
        return not self.flat

    def fits(self, shape: Shape) -> bool:
        """Return whether rows are whole blocks."""
        return shape[1] % self.block == 0

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return two numbers a byte; flat ones tell no shape."""
        return None if self.flat else (data[0], 2 * data[1])

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return packed codes (the first of a pair in the high bits) and the blocks' maxima."""
        rows, columns = shape
        if self.flat:
            return self._flat(rows * columns)
        return {
            "weight": ("U8", (rows, columns // 2)),
            "weight_absmax": ("F32", (rows, columns // self.block)),
        }

    def _flat(self, count: int) -> dict[str, Spec]:
        maxima = count // self.block
        stored: dict[str, Spec] = {
            "weight": ("U8", (-(-count // 2), 1)),
            "weight_absmax": ("U8" if self.nested_block else "F32", (maxima,)),
        }
        if self.nested_block:
            stored["weight_nested_absmax"] = ("F32", (-(-maxima // self.nested_block),))
            stored["weight_nested_map"] = ("F32", (256,))
        return stored

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return a decoded chunk (fp32 at most), where only the operator can decode on a CPU; all
        other ways decode into the output. Nested maxima are decoded before, by 32-bit indices."""
        nested = 12 * (shape[0] * shape[1] // self.block) if self.nested_block else 0
        return nested + (0 if device == "cuda" else 4 * shape[1] * chunk_rows(*shape, device))
