"""The arithmetic of `penstock.formats.quanto`: affine 4-bit groups."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.formats.quanto import QuantoInt4, groups_of
from penstock.formats.rows import Shape, chunk_rows, row_slices
from penstock.quant.values.tensors import DTYPES, output, row_amax


def quantise(fmt: QuantoInt4, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Quantise to stored tensors by quanto's rule: the range of a group is its 16 codes; a constant
    group gets scale 1. Its operator makes the codes, of fp32 quotients, which its own modules round
    first to the weight's dtype."""
    row_amax(weight, name)
    count, size = groups_of((weight.shape[0], weight.shape[1]))
    groups = weight.reshape(count, size)
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    tag_dtype = weight.dtype if fmt.scale_tag is None else DTYPES[fmt.scale_tag]
    scale = ((high.float() - low.float()) / 15).to(tag_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    shift = (-low).to(tag_dtype)
    codes = torch.empty(count, size, dtype=torch.uint8, device=weight.device)
    for rows in row_slices(count, size, weight.device.type):
        part, shifts, scales = (each[rows].float() for each in (groups, shift, scale))
        codes[rows] = operators().quantize_affine(part, 4, 0, None, scales, shifts)
    return {"weight._data._data": _pack(codes), "weight._scale": scale, "weight._shift": shift}


def dequantise(
    fmt: QuantoInt4,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return quanto's own values: computed in the scale's dtype, then cast to ``dtype``."""
    packed, scale = tensors["weight._data._data"], tensors["weight._scale"]
    shift = tensors["weight._shift"]
    out = output(out, shape, dtype, packed.device)
    groups = out.view(groups_of(shape))
    size = chunk_rows(packed.shape[0], packed.shape[1], packed.device.type)
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


def operators() -> Any:
    """Return optimum-quanto's registered operators; imported by the first weight that is quantised
    for it, for it takes seconds."""
    importlib.import_module("optimum.quanto")
    return torch.ops.quanto


def codes_of(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 8-bit codes of fp32 rows by their fp32 scales (rows, 1), or one for all (1, 1),
    rounded by quanto's operator."""
    # One row counts as a whole tensor: the operator knows no axis of one.
    axis, scale = (0, scale) if len(scale) > 1 else (None, scale.reshape(()))
    codes: Tensor = operators().quantize_symmetric(weight, dtype, axis, scale)
    # Symmetric, as quanto's are but for rows whose scale underflows in fp16.
    return codes.clamp_(min=-127) if dtype == torch.int8 else codes


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
    """Yield the chunks of packed rows with the group rows that each of their two halves decodes
    to."""
    half_rows = len(packed)
    for half, available in ((0, half_rows), (1, count - half_rows)):
        for rows in row_slices(available, packed.shape[1], packed.device.type):
            first = half * half_rows
            yield packed[rows], slice(first + rows.start, first + rows.stop), half
