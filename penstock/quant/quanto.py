"""optimum-quanto's 4-bit storage, so that its files open.

Source: optimum-quanto 0.2.7 (`tensor/grouped.py`, `tensor/packed.py`, `tensor/qbits.py`,
`nn/qmodule.py`). Its 8-bit storages are `penstock.quant.scaled.Scaled8` under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.quant.rows import (
    DTYPES,
    Shape,
    Spec,
    chunk_rows,
    output,
    row_amax,
    row_slices,
)


def group_size(columns: int) -> int | None:
    """quanto's choice: 128, or the next smaller multiple of 32 that divides the row; None (a group
    is a row) where no such size exists or the row is not longer than 128."""
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

    def fits(self, shape: Shape) -> bool:
        """Every shape can be stored."""
        return True

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Packed codes, scales and shifts of the groups."""
        count, size = _groups(shape)
        tag = self.scale_tag or compute_dtype
        return {
            "weight._data._data": ("U8", (-(-count // 2), size)),
            "weight._scale": (tag, (count, 1)),
            "weight._shift": (tag, (count, 1)),
        }

    def workspace_bytes(self, shape: Shape, device: torch.device) -> int:
        """A chunk of codes and one of values."""
        count, size = _groups(shape)
        return 5 * size * chunk_rows(-(-count // 2), size, device)

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Stored tensors by quanto's rule: the range of a group is its 16 codes; a constant group
        gets scale 1. The quotient is fp32, where quanto rounds it to the weight's dtype first.

        Raises:
            CheckpointError: NaN or Inf.
        """
        row_amax(weight, name)
        count, size = _groups((weight.shape[0], weight.shape[1]))
        groups = weight.reshape(count, size)
        low, high = torch.aminmax(groups, dim=1, keepdim=True)
        tag_dtype = weight.dtype if self.scale_tag is None else DTYPES[self.scale_tag]
        scale = ((high.float() - low.float()) / 15).to(tag_dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        shift = (-low).to(tag_dtype)
        codes = torch.empty(count, size, dtype=torch.uint8, device=weight.device)
        for rows in row_slices(count, size, weight.device):
            part = groups[rows].float().add(shift[rows].float()).div_(scale[rows].float())
            codes[rows] = part.round_().clamp_(0, 15).to(torch.uint8)
        return {"weight._data._data": _pack(codes), "weight._scale": scale, "weight._shift": shift}

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """quanto's own values: computed in the scale's dtype, then cast to ``dtype``."""
        packed, scale = tensors["weight._data._data"], tensors["weight._scale"]
        shift = tensors["weight._shift"]
        out = output(out, shape, dtype, packed.device)
        groups = out.view(_groups(shape))
        size = chunk_rows(packed.shape[0], packed.shape[1], packed.device)
        codes = torch.empty(size, packed.shape[1], dtype=torch.uint8, device=packed.device)
        chunk = torch.empty_like(codes, dtype=scale.dtype)
        for source, rows, half in _halves(packed, len(groups)):
            target = groups[rows]
            code = codes[: len(target)]
            _nibble(source, half, code)
            work = target if dtype == scale.dtype else chunk[: len(target)]
            work.copy_(code).mul_(scale[rows]).sub_(shift[rows])
            if dtype != scale.dtype:
                target.copy_(work)
        return out


def _groups(shape: Shape) -> tuple[int, int]:
    size = group_size(shape[1]) or shape[1]
    return shape[0] * shape[1] // size, size


def _pack(codes: Tensor) -> Tensor:
    half = -(-len(codes) // 2)
    packed = codes[:half].clone()
    packed[: len(codes) - half] |= codes[half:] << 4
    return packed


def _nibble(source: Tensor, half: int, out: Tensor) -> None:
    if half == 0:
        torch.bitwise_and(source, 15, out=out)
    else:
        torch.bitwise_right_shift(source, 4, out=out)


def _halves(packed: Tensor, count: int) -> Iterator[tuple[Tensor, slice, int]]:
    """Chunks of packed rows with the group rows that each of their two halves decodes to."""
    half_rows = len(packed)
    for half, available in ((0, half_rows), (1, count - half_rows)):
        for rows in row_slices(available, packed.shape[1], packed.device):
            first = half * half_rows
            yield packed[rows], slice(first + rows.start, first + rows.stop), half
