"""Numbers of 4 or 8 bits with a scale for each 16 or 32 of a row, as Blackwell's tensor cores take
them: NVFP4 and MXFP8, in ComfyUI's files.

Source: comfy-kitchen 0.2.40 (`tensor/nvfp4.py`, `tensor/mxfp8.py`): weights are padded to whole
tiles, and their true shape is stored nowhere; scales lie in cuBLAS' order, tiles of 128 rows by 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from penstock.formats.rows import Shape, Spec, chunk_rows
from penstock.units import align_up

TILE_ROWS = 128
"""Rows whose scales lie together."""


E2M1_MAX = 6.0


@dataclass(frozen=True)
class Micro:
    """NVFP4: pairs of E2M1 numbers (the first in the high half), e4m3 scales, and one for all in
    fp32. MXFP8: e4m3 numbers, and scales that are powers of two (E8M0).

    Attributes:
        block: numbers that share a scale, along a row.
        padding: rows and columns are padded to multiples of it.
        scale_tag: dtype of the scales; E8M0 is also stored as "U8".
        whole_dims: shape of the scale for all, of one element; None: there is none.
    """

    name: Literal["nvfp4", "mxfp8"]
    block: int
    padding: int
    scale_tag: str
    whole_dims: tuple[int, ...] | None

    plain: ClassVar[bool] = False
    writable: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False

    @property
    def gemm(self) -> Literal["nvfp4", "mxfp8"]:
        """The product of its own that a card may have."""
        return self.name

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def packed(self) -> int:
        """Numbers in a byte."""
        return 2 if self.name == "nvfp4" else 1

    def fits(self, shape: Shape) -> bool:
        """Return True: every shape can be stored."""
        return True

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """Return the padded shape: the weight's own, where it is whole tiles."""
        return (data[0], data[1] * self.packed)

    def scales(self, shape: Shape) -> Shape:
        """Return the rows and columns of the scales of a weight, before they are put in tiles."""
        rows, columns = (align_up(side, self.padding) for side in shape)
        return rows, columns // self.block

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return padded numbers, the scales in whole tiles, and the scale for all."""
        rows, columns = (align_up(side, self.padding) for side in shape)
        tiles = (align_up(rows, TILE_ROWS), align_up(columns // self.block, 4))
        tag = "U8" if self.name == "nvfp4" else "F8_E4M3"
        stored: dict[str, Spec] = {
            "weight": (tag, (rows, columns // self.packed)),
            "weight_scale": (self.scale_tag, tiles),
        }
        if self.whole_dims is not None:
            stored["weight_scale_2"] = ("F32", self.whole_dims)
        return stored

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return the scales in the rows' order, twice; a chunk in fp32, its codes and their
        scales."""
        rows, count = self.scales(shape)
        columns = align_up(shape[1], self.padding)
        chunk = columns * chunk_rows(rows, columns, device)
        return 2 * align_up(rows, TILE_ROWS) * align_up(count, 4) + 8 * chunk + 4096
