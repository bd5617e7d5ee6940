"""ggml's types of 1 to 3 bits whose codes name points of a grid: four or eight numbers at once.

Source: ggml's `ggml-common.h` and `ggml-quants.c`, checked value for value against the `gguf`
package. A block is 256 numbers; its first two bytes are an fp16 scale (but for IQ1_M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.quant.values.ggml_tables import even_signs, grid, half, signs

_DELTA = 0.125
"""What IQ1's points are moved by, up or down."""


def _words(blocks: Tensor, start: int, count: int) -> Tensor:
    """Return ``count`` little-endian 32-bit numbers from byte ``start``: (blocks, count), int32."""
    return blocks[:, start : start + 4 * count].contiguous().view(torch.int32)


def _shorts(blocks: Tensor, start: int, count: int) -> Tensor:
    """Return ``count`` little-endian 16-bit numbers from byte ``start``, unsigned, as int32."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.int16).int() & 0xFFFF


def _nibbles(packed: Tensor) -> Tensor:
    """Map bytes (blocks, n) -> (blocks, 2 n): of each byte the low half, then the high
    one."""
    return torch.stack([packed & 15, packed >> 4], dim=2).view(len(packed), -1)


def _bits(packed: Tensor, width: int, each: int) -> Tensor:
    """Return the ``each`` lowest fields of ``width`` bits of every number: (blocks, n * each)."""
    fields = [packed >> width * place & (1 << width) - 1 for place in range(each)]
    return torch.stack(fields, dim=2).view(len(packed), -1)


def _points(name: str, index: Tensor, out: Tensor) -> None:
    table = grid(name, index.device)
    # The eight (or four) bytes of a point move as one integer.
    kind = torch.int64 if table.shape[1] == 8 else torch.int32
    found = table.view(kind).flatten().index_select(0, index.reshape(-1).int())
    out.copy_(found.view(torch.int8).view(out.shape))


def _sign(index: Tensor, out: Tensor) -> None:
    found = signs(index.device).index_select(0, index.reshape(-1).int())
    out.mul_(found.view(torch.int8).view(out.shape))


def _scaled(out: Tensor, scale: Tensor) -> None:
    """``scale`` (blocks, groups), each of 256 / groups numbers."""
    out.view(*scale.shape, -1).mul_(scale[:, :, None])


def iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    """8 groups of 32: four bytes of indices; four times seven signs and four bits of scale."""
    words = _words(blocks, 2, 16).view(-1, 8, 2)
    index = words[:, :, 0].contiguous().view(torch.uint8)
    _points("IQ2_XXS", index, out)
    tail = words[:, :, 1]
    _sign(even_signs(_bits(tail, 7, 4)), out)
    _scaled(out, half(blocks, 0) * (0.5 + (tail >> 28 & 15)) * 0.25)


def iq2_xs(blocks: Tensor, out: Tensor) -> None:
    """Decode indices of nine bits with seven signs each; 16 scales of four bits."""
    codes = _shorts(blocks, 2, 32)
    _points("IQ2_XS", codes & 511, out)
    _sign(even_signs(codes >> 9), out)
    _scaled(out, half(blocks, 0) * (0.5 + _nibbles(blocks[:, 66:74])) * 0.25)


def iq2_s(blocks: Tensor, out: Tensor) -> None:
    """Decode indices of ten bits, the upper two apart; a byte of signs each; 16 scales of four
    bits."""
    index = _bits(blocks[:, 66:74], 2, 4).int().bitwise_left_shift_(8)
    _points("IQ2_S", index.bitwise_or_(blocks[:, 2:34]), out)
    _sign(blocks[:, 34:66], out)
    _scaled(out, half(blocks, 0) * (0.5 + _nibbles(blocks[:, 74:82])) * 0.25)


def iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    """Decode 64 bytes of indices, four numbers each; four times seven signs and four bits of
    scale."""
    _points("IQ3_XXS", blocks[:, 2:66], out)
    tail = _words(blocks, 66, 8)
    _sign(even_signs(_bits(tail, 7, 4)), out)
    _scaled(out, half(blocks, 0) * (0.5 + (tail >> 28 & 15)) * 0.5)


def iq3_s(blocks: Tensor, out: Tensor) -> None:
    """Decode indices of nine bits, the upper one apart; bytes of signs; 8 scales of four bits."""
    index = _bits(blocks[:, 66:74], 1, 8).int().bitwise_left_shift_(8)
    _points("IQ3_S", index.bitwise_or_(blocks[:, 2:66]), out)
    _sign(blocks[:, 74:106], out)
    _scaled(out, half(blocks, 0) * (1 + 2 * _nibbles(blocks[:, 106:110])))


def iq1_s(blocks: Tensor, out: Tensor) -> None:
    """Decode indices of eleven bits; of the 16 bits that hold the upper three, the rest is scale,
    delta's sign."""
    heads = _shorts(blocks, 34, 8)
    _points("IQ1_S", blocks[:, 2:34] | _bits(heads, 3, 4) << 8, out)
    delta = torch.where(heads & 0x8000 == 0, _DELTA, -_DELTA)
    out.view(-1, 8, 32).add_(delta[:, :, None])
    _scaled(out, half(blocks, 0) * (2 * (heads >> 12 & 7) + 1))


def iq1_m(blocks: Tensor, out: Tensor) -> None:
    """Decode as IQ1_S, a delta's sign for eight numbers, a scale for 16; the block's fp16 scale
    lies in the upper four bits of the four 16-bit numbers at its end."""
    heads, scales = _nibbles(blocks[:, 32:48]).int(), _shorts(blocks, 48, 4)
    _points("IQ1_S", blocks[:, :32] | (heads & 7) << 8, out)
    out.view(-1, 32, 8).add_(torch.where(heads & 8 == 0, _DELTA, -_DELTA)[:, :, None])
    top = scales >> 12
    whole = top[:, :1] | top[:, 1:2] << 4 | top[:, 2:3] << 8 | top[:, 3:] << 12
    block = whole.to(torch.int16).view(torch.float16).float()
    _scaled(out, block * (2 * _bits(scales, 3, 4) + 1))
