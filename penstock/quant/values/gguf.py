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

from penstock.formats.gguf import Gguf
from penstock.formats.rows import Shape, chunk_rows, row_slices
from penstock.quant.values import ggml_grids, ggml_tables
from penstock.quant.values.ggml_tables import half, runs
from penstock.quant.values.tensors import output, row_amax

Decoder: TypeAlias = Callable[[Tensor, Tensor], None]


def quantise(fmt: Gguf, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Quantise to stored bytes, for Q8_0 only: equal to ggml's reference."""
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
    """Return ggml's fp32 values, rounded once to ``dtype``."""
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


def _nibbles(packed: Tensor) -> Tensor:
    """Map bytes (blocks, runs, n) -> codes (blocks, 2 * runs * n): each run's low halves,
    then high."""
    blocks, runs, size = packed.shape
    codes = torch.empty(blocks, runs, 2, size, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=codes[:, :, 1])
    return codes.view(blocks, -1)


def _moved(packed: Tensor, left: int, mask: int) -> Tensor:
    """Return ``packed`` shifted left (right if negative), masked."""
    shifted = packed << left if left >= 0 else packed >> -left
    return shifted.bitwise_and_(mask)


def _signed(codes: Tensor, offset: int) -> Tensor:
    """Return ``codes - offset`` as int8, in place."""
    return codes.view(torch.int8).sub_(offset)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.int8)[:, 2:]).mul_(half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_signed(_nibbles(blocks[:, None, 2:]), 8)).mul_(half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(blocks[:, None, 4:])).mul_(half(blocks, 0)).add_(half(blocks, 2))


def _fifth_bits(packed: Tensor) -> Tensor:
    """Map bytes (blocks, 4) -> 0 or 16 for each of 32 elements: bit ``i % 8`` of byte ``i //
    8``."""
    byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    table = torch.stack([_moved(byte, 4 - bit, 16) for bit in range(8)], dim=1)
    # Eight bytes of the table move as one integer.
    eight = table.view(torch.int64).flatten()
    return eight.index_select(0, packed.flatten().int()).view(torch.uint8).view(-1, 32)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 6:]).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    out.copy_(_signed(codes, 16)).mul_(half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, None, 8:]).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    out.copy_(codes).mul_(half(blocks, 0)).add_(half(blocks, 2))


def _scale_groups(blocks: Tensor, out: Tensor) -> None:
    """Q4_K and Q5_K: ``(d * scale) * code - (dmin * minimum)`` for 8 groups of 32; the 6-bit scales
    and minima of groups 0-3 lie in bytes 4-11, the rest of groups 4-7 in bytes 12-15."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    # Groups 0-3: six bits as they lie. Groups 4-7: four bits of the third word, and the two top
    # bits that the first (scales) or second (minima) word has left.
    scale = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    groups = out.view(-1, 8, 32)
    groups.mul_((half(blocks, 0) * scale)[:, :, None])
    groups.sub_((half(blocks, 2) * least)[:, :, None])


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(runs(blocks, 16, 4, 32)))
    _scale_groups(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    codes, upper = _nibbles(runs(blocks, 48, 4, 32)), blocks[:, 16:48].contiguous()
    for group, part in enumerate(codes.view(-1, 8, 32).unbind(1)):
        part |= _moved(upper, 4 - group, 16)
    out.copy_(codes)
    _scale_groups(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    codes, upper = _nibbles(runs(blocks, 0, 2, 64)), runs(blocks, 128, 2, 32).contiguous()
    for run, part in enumerate(codes.view(-1, 2, 4, 32).unbind(2)):
        # Bits 4 and 5 of a code: two bits of the upper byte, moved under 0b110000 run by run.
        part |= _moved(upper, 4 - 2 * run, 48)
    scale = half(blocks, 208) * blocks.view(torch.int8)[:, 192:208]
    out.copy_(_signed(codes, 32))
    out.view(-1, 16, 16).mul_(scale[:, :, None])


def _crumbs(packed: Tensor) -> Tensor:
    """Map bytes (blocks, runs, n) -> 2-bit codes (blocks, 4 * runs * n): each run's lowest,
    and up."""
    codes = torch.empty(*packed.shape[:2], 4, packed.shape[2], dtype=torch.uint8,
                        device=packed.device)  # fmt: skip
    for place, part in enumerate(codes.unbind(2)):
        torch.bitwise_right_shift(packed, 2 * place, out=part)
    return codes.bitwise_and_(3).view(len(packed), -1)


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    """``(d * scale) * code - (dmin * minimum)`` for 16 groups of 16."""
    out.copy_(_crumbs(runs(blocks, 16, 2, 32)))
    groups, packed = out.view(-1, 16, 16), blocks[:, :16]
    groups.mul_((half(blocks, 80) * (packed & 15))[:, :, None])
    groups.sub_((half(blocks, 82) * (packed >> 4))[:, :, None])


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    """Codes of two bits, less 4 where the third, in bytes 0-31, is not set; 16 scales of six bits,
    four in bytes 96-103 and two in bytes 104-107."""
    codes, upper = _crumbs(runs(blocks, 32, 2, 32)), blocks[:, :32].contiguous()
    for group, part in enumerate(codes.view(-1, 8, 32).unbind(1)):
        part |= _moved(upper, 2 - group, 4)
    lower, top = _nibbles(blocks[:, None, 96:104]), _crumbs(blocks[:, None, 104:108])
    scale = _signed(lower | top << 4, 32)
    out.copy_(_signed(codes, 4))
    out.view(-1, 16, 16).mul_((half(blocks, 108) * scale)[:, :, None])


def _tq2_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_signed(_crumbs(runs(blocks, 0, 2, 32)), 1)).mul_(half(blocks, 64))


def _tq1_0(blocks: Tensor, out: Tensor) -> None:
    """Five numbers of three values in a byte, as the digits of a fraction of 256 in base three."""
    codes = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
    for first, size, digits, start in ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)):
        packed, end = blocks[:, first : first + size], start + digits * size
        # A product keeps its lower byte: the digits before this one are gone.
        for digit, part in enumerate(codes[:, start:end].view(-1, digits, size).unbind(1)):
            torch.mul(packed, 3**digit, out=part)
    # The digit is the whole part of 3 / 256 of what is left.
    above = codes.ge(86).view(torch.int8)
    out.copy_(above.add_(codes.ge_(171).view(torch.int8)).sub_(1)).mul_(half(blocks, 52))


_DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "Q8_0": _q8_0,
        "Q6_K": _q6_k,
        "Q5_K": _q5_k,
        "Q4_K": _q4_k,
        "Q3_K": _q3_k,
        "Q2_K": _q2_k,
        "Q5_1": _q5_1,
        "Q5_0": _q5_0,
        "Q4_1": _q4_1,
        "Q4_0": _q4_0,
        "IQ4_NL": ggml_tables.iq4_nl,
        "IQ4_XS": ggml_tables.iq4_xs,
        "MXFP4": ggml_tables.mxfp4,
        "NVFP4": ggml_tables.nvfp4,
        "IQ3_S": ggml_grids.iq3_s,
        "IQ3_XXS": ggml_grids.iq3_xxs,
        "IQ2_S": ggml_grids.iq2_s,
        "IQ2_XS": ggml_grids.iq2_xs,
        "IQ2_XXS": ggml_grids.iq2_xxs,
        "IQ1_M": ggml_grids.iq1_m,
        "IQ1_S": ggml_grids.iq1_s,
        "TQ2_0": _tq2_0,
        "TQ1_0": _tq1_0,
    }
)
