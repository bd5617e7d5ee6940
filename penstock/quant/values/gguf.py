"""The arithmetic of `penstock.formats.gguf`: ggml's blocks, decoded in torch.

Source: the block layouts of ggml (`ggml-common.h`, `ggml-quants.c`), checked value for value
against the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from penstock.errors import UsageError
from penstock.formats.gguf import Gguf
from penstock.formats.rows import Shape, chunk_rows, row_slices
from penstock.quant.values.tensors import output, row_amax

Decoder: TypeAlias = Callable[[Tensor, Tensor], None]


def quantise(fmt: Gguf, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Stored bytes, for Q8_0 only: equal to ggml's reference.

    Raises:
        UsageError: another type; those are read, not written.
    """
    if not fmt.writable:
        raise UsageError(
            f"{fmt.ggml_type} is read, not written",
            expected="gguf-q8_0, int8 or nf4 as the format to quantise to",
            found=fmt.name,
        )
    if not fmt.fits((weight.shape[0], weight.shape[1])):
        raise ValueError(f"rows of {weight.shape[1]} are not whole blocks of {fmt.block}")
    row_amax(weight, name)
    spec = fmt.storage((weight.shape[0], weight.shape[1]), "F32")["weight"]
    stored = torch.empty(spec[1], dtype=torch.uint8, device=weight.device)
    for rows in row_slices(weight.shape[0], weight.shape[1], weight.device.type):
        blocks = weight[rows].float().reshape(-1, fmt.block)
        stored[rows] = _encode_q8_0(blocks).view(-1, spec[1][1])
    return {"weight": stored}


def dequantise(
    fmt: Gguf,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """ggml's fp32 values, rounded once to ``dtype``."""
    stored = tensors["weight"]
    out = output(out, shape, dtype, stored.device)
    rows = 0 if dtype == torch.float32 else chunk_rows(*shape, stored.device.type)
    chunk = torch.empty(rows, shape[1], dtype=torch.float32, device=stored.device)
    for part in row_slices(*shape, stored.device.type):
        target = out[part]
        work = target if dtype == torch.float32 else chunk[: len(target)]
        _DECODERS[fmt.ggml_type](stored[part].view(-1, fmt.block_bytes), work.view(-1, fmt.block))
        if dtype != torch.float32:
            target.copy_(work)
    return out


def _encode_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(dim=1, keepdim=True).div_(127)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    scaled = blocks * inverse
    magnitude = scaled.abs()
    whole = magnitude.floor()
    # Half away from zero, as C's roundf; torch.round is half to even.
    codes = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    head = scale.to(torch.float16).view(torch.uint8)
    return torch.cat([head, codes.to(torch.int8).view(torch.uint8)], dim=1)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte ``start`` of each block, in fp32: (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _runs(blocks: Tensor, start: int, runs: int, size: int) -> Tensor:
    """The bytes from ``start`` of each block as (blocks, runs, size), without a copy."""
    stride = blocks.stride(0)
    offset = blocks.storage_offset() + start
    return blocks.as_strided((len(blocks), runs, size), (stride, size, 1), offset)


def _nibbles(packed: Tensor) -> Tensor:
    """Bytes (blocks, runs, n) -> codes (blocks, 2 * runs * n): each run's low halves, then high."""
    blocks, runs, size = packed.shape
    codes = torch.empty(blocks, runs, 2, size, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=codes[:, :, 1])
    return codes.view(blocks, -1)


def _moved(packed: Tensor, left: int, mask: int) -> Tensor:
    """``packed`` shifted left (right if negative), masked."""
    shifted = packed << left if left >= 0 else packed >> -left
    return shifted.bitwise_and_(mask)


def _signed(codes: Tensor, offset: int) -> Tensor:
    """``codes - offset`` as int8, in place."""
    return codes.view(torch.int8).sub_(offset)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.int8)[:, 2:]).mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_signed(_nibbles(blocks[:, None, 2:]), 8)).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(blocks[:, None, 4:])).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bytes (blocks, 4) -> 0 or 16 for each of 32 elements: bit ``i % 8`` of byte ``i // 8``."""
    byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    table = torch.stack([_moved(byte, 4 - bit, 16) for bit in range(8)], dim=1)
    # Eight bytes of the table move as one integer.
    eight = table.view(torch.int64).flatten()
    return eight.index_select(0, packed.flatten().int()).view(torch.uint8).view(-1, 32)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 6:]).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    out.copy_(_signed(codes, 16)).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 8:]).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    out.copy_(codes).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _scale_groups(blocks: Tensor, out: Tensor) -> None:
    """Q4_K and Q5_K: ``(d * scale) * code - (dmin * minimum)`` for 8 groups of 32; the 6-bit scales
    and minima of groups 0-3 lie in bytes 4-11, the rest of groups 4-7 in bytes 12-15."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    groups = out.view(-1, 8, 32)
    groups.mul_((_half(blocks, 0) * scale)[:, :, None])
    groups.sub_((_half(blocks, 2) * least)[:, :, None])


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(_runs(blocks, 16, 4, 32)))
    _scale_groups(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    codes, upper = _nibbles(_runs(blocks, 48, 4, 32)), blocks[:, 16:48].contiguous()
    for group, part in enumerate(codes.view(-1, 8, 32).unbind(1)):
        part |= _moved(upper, 4 - group, 16)
    out.copy_(codes)
    _scale_groups(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    codes, upper = _nibbles(_runs(blocks, 0, 2, 64)), _runs(blocks, 128, 2, 32).contiguous()
    for run, part in enumerate(codes.view(-1, 2, 4, 32).unbind(2)):
        part |= _moved(upper, 4 - 2 * run, 48)
    scale = _half(blocks, 208) * blocks.view(torch.int8)[:, 192:208]
    out.copy_(_signed(codes, 32))
    out.view(-1, 16, 16).mul_(scale[:, :, None])


_DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "Q8_0": _q8_0,
        "Q6_K": _q6_k,
        "Q5_K": _q5_k,
        "Q4_K": _q4_k,
        "Q5_1": _q5_1,
        "Q5_0": _q5_0,
        "Q4_1": _q4_1,
        "Q4_0": _q4_0,
    }
)
