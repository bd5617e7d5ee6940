"""Tables that ggml's codes are looked up in, and the types that are nothing else: 4-bit codebooks.

Source: ggml's `ggml-common.h` and `ggml-quants.c`. A table is made once a device and kept: they are
constants of a few kilobytes, and a copy to a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

_NORMAL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""IQ4_NL's points, denser around zero."""

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Numbers of a sign, two bits of exponent and one of mantissa, doubled."""


def half(blocks: Tensor, start: int) -> Tensor:
    """Return the fp16 number at byte ``start`` of each block, in fp32: (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def runs(blocks: Tensor, start: int, count: int, size: int) -> Tensor:
    """Return the bytes from ``start`` of each block as (blocks, count, size), without a copy."""
    stride = blocks.stride(0)
    offset = blocks.storage_offset() + start
    return blocks.as_strided((len(blocks), count, size), (stride, size, 1), offset)


@cache
def pairs(points: Sequence[int], device: torch.device, *, high_first: bool = False) -> Tensor:
    """For each byte the points of its low and its high half, as one int16; or the other way."""
    values = torch.tensor(points, dtype=torch.int8, device=device)
    byte = torch.arange(256, device=device)
    halves = [values[byte & 15], values[byte >> 4]]
    both = torch.stack(halves[::-1] if high_first else halves, dim=1)
    return both.view(torch.int16).flatten()


def _decode_pairs(packed: Tensor, points: Sequence[int], out: Tensor) -> None:
    """Bytes (blocks, runs, n) -> points (blocks, runs, 2, n): each run's low halves, then high."""
    found = pairs(points, packed.device).index_select(0, packed.reshape(-1).int())
    halves = found.view(torch.int8).view(*packed.shape, 2)
    out.view(*packed.shape[:2], 2, -1).copy_(halves.transpose(2, 3))


def iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """Points of a block of 32, times its scale."""
    _decode_pairs(blocks[:, None, 2:], _NORMAL, out)
    out.mul_(half(blocks, 0))


def iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """8 groups of 32 with 6-bit scales: four bits in bytes 4-7, two in the 16 bits at byte 2."""
    _decode_pairs(runs(blocks, 8, 8, 16), _NORMAL, out)
    lower = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).view(-1, 8)
    upper = torch.cat([blocks[:, 2:3] >> 2 * i & 3 for i in range(4)]
                      + [blocks[:, 3:4] >> 2 * i & 3 for i in range(4)], dim=1)  # fmt: skip
    scale = (lower | upper << 4).view(torch.int8).sub_(32)
    out.view(-1, 8, 32).mul_((half(blocks, 0) * scale)[:, :, None])


def mxfp4(blocks: Tensor, out: Tensor) -> None:
    """Doubled E2M1 numbers, times half of the power of two that byte 0 names."""
    _decode_pairs(blocks[:, None, 1:], E2M1, out)
    power = blocks[:, :1].int()
    # The two least powers are subnormal in fp32.
    bits = torch.where(power < 2, 0x00200000 << power.clamp(max=1), (power - 1) << 23)
    out.mul_(bits.view(torch.float32))


def nvfp4(blocks: Tensor, out: Tensor) -> None:
    """Four groups of 16 doubled E2M1 numbers, each times half of its scale in unsigned e4m3."""
    _decode_pairs(runs(blocks, 4, 4, 8), E2M1, out)
    code = blocks[:, :4]
    exponent, mantissa = (code >> 3 & 15).int(), (code & 7).float()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    scale = torch.where(exponent == 0, mantissa * 2**-9, normal)
    scale = torch.where(code == 127, 0, scale).mul_(0.5)
    out.view(-1, 4, 16).mul_(scale[:, :, None])


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """Return the points of a type by index, int8 ``(points, 8 or 4)``."""
    from safetensors.torch import load

    held = load((files("penstock") / "assets" / "ggml_grids.safetensors").read_bytes())
    table: Tensor = held[name].to(device)
    return table


@cache
def signs(device: torch.device) -> Tensor:
    """For each byte the signs of eight numbers, 1 or -1, as one int64: bit ``i`` is the ``i``-th's.

    Where seven bits are stored, the eighth makes the number of minus signs even.
    """
    byte = torch.arange(256, device=device)
    table = torch.stack([1 - 2 * (byte >> bit & 1) for bit in range(8)], dim=1).to(torch.int8)
    return table.view(torch.int64).flatten()


def even_signs(seven: Tensor) -> Tensor:
    """Map seven bits (int32) -> eight, the last of which makes the ones even."""
    parity = seven
    for shift in (4, 2, 1):
        parity = parity ^ parity >> shift
    return seven | (parity & 1) << 7
