"""The arithmetic of `penstock.formats.micro`: NVFP4 and MXFP8."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.formats.micro import Micro
from penstock.formats.rows import Shape, chunk_rows, row_slices
from penstock.quant.values.ggml_tables import E2M1, pairs
from penstock.quant.values.scaled import decode_e4m3
from penstock.quant.values.tensors import output


def dequantise(
    fmt: Micro,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``number * (scale * scale for all)`` in fp32, rounded once to ``dtype``."""
    stored = tensors["weight"]
    out = output(out, shape, dtype, stored.device)
    scales = in_rows(tensors["weight_scale"], fmt.scales(shape))
    whole = tensors["weight_scale_2"].reshape(1, 1) if fmt.whole_dims is not None else None
    rows, columns = shape[0], scales.shape[1] * fmt.block
    size = chunk_rows(rows, columns, stored.device.type)
    chunk = torch.empty(size, columns, device=stored.device)
    for part in row_slices(rows, columns, stored.device.type):
        work = chunk[: part.stop - part.start]
        _numbers(fmt, stored[part], work)
        blocks = work.view(len(work), -1, fmt.block)
        blocks.mul_(_scale(scales[part], whole)[:, :, None])
        out[part] = work[:, : shape[1]]
    return out


def in_rows(tiles: Tensor, shape: Shape) -> Tensor:
    """Return the scales (rows, count) as bytes, from cuBLAS' order: tiles of 128 rows by 4, a
    tile's row ``r`` at ``r % 32``, its four quarters side by side."""
    rows, count = shape
    across = -(-count // 4)
    apart = tiles.view(torch.uint8).reshape(-1, across, 32, 4, 4)
    return apart.permute(0, 3, 2, 1, 4).reshape(-1, 4 * across)[:rows, :count]


def _numbers(fmt: Micro, stored: Tensor, out: Tensor) -> None:
    """NVFP4's are left doubled."""
    if fmt.packed == 2:
        table = pairs(E2M1, stored.device, high_first=True)
        found = table.index_select(0, stored.reshape(-1).int())
        out.copy_(found.view(torch.int8).view(out.shape))
    elif stored.device.type == "cpu":
        bits = torch.empty(out.shape, dtype=torch.int16)
        decode_e4m3(stored, bits, out)
    else:
        out.copy_(stored)


def _scale(codes: Tensor, whole: Tensor | None) -> Tensor:
    if whole is None:  # the exponent of an fp32; 0 stands for no power, but for 0
        return (codes.int() << 23).view(torch.float32)
    # The half takes back the doubling of `_numbers`.
    return codes.contiguous().view(torch.float8_e4m3fn).float().mul_(whole.float()).mul_(0.5)
