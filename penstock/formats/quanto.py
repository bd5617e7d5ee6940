"""optimum-quanto's 4-bit storage, so that its files open.

Source: optimum-quanto 0.2.7 (`tensor/grouped.py`, `tensor/packed.py`, `tensor/qbits.py`,
`nn/qmodule.py`). Its 8-bit storages are `penstock.formats.scaled.Scaled8` under other names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.formats.rows import Shape, Spec, chunk_rows


def group_size(columns: int) -> int | None:
    """Return quanto's choice: 128, or the next smaller multiple of 32 that divides the row; None (a
    group is a row) where no such size exists or the row is not longer than 128."""
    sizes = (128, 96, 64, 32) if columns > 128 else ()
    return next((size for size in sizes if columns % size == 0), None)


@dataclass(frozen=True)
class QuantoInt4:
    """Affine 4-bit groups: ``value = scale * code - shift``, rounded to the scale's dtype twice.

    The weight is seen as groups ``(count, size)``; byte ``i`` packs group row ``i`` in its low and
    row ``i + ceil(count / 2)`` in its high half. ``scale_tag`` None means the compute dtype.
    """

    name: str = "quanto-int4"
    scale_tag: str | None = None

    plain: ClassVar[bool] = False
    writable: ClassVar[bool] = True
    by_rows: ClassVar[bool] = False
    gemm: ClassVar[None] = None

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def fits(self, shape: Shape) -> bool:
        """Return True: every shape can be stored."""
        return True

    def logical(self, data: tuple[int, ...]) -> None:
        """Return nothing: groups do not determine a shape."""
        return

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return packed codes, scales and shifts of the groups."""
        count, size = groups_of(shape)
        tag = self.scale_tag or compute_dtype
        return {
            "weight._data._data": ("U8", (-(-count // 2), size)),
            "weight._scale": (tag, (count, 1)),
            "weight._shift": (tag, (count, 1)),
        }

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return a chunk of codes and one of values."""
        count, size = groups_of(shape)
        return 5 * size * chunk_rows(-(-count // 2), size, device)


def groups_of(shape: Shape) -> tuple[int, int]:
    """Return number and size of the groups of a weight."""
    size = group_size(shape[1]) or shape[1]
    return shape[0] * shape[1] // size, size
