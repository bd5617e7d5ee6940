"""Writes ggml's K-quants, IQ4_NL and IQ4_XS, which no Python package writes, so that their quality
can be measured.

Scales are searched by least squares over a few ranges, each weight counted by its square; ggml's
own search tries more and may end a little nearer. Layouts: `ggml-common.h` of ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

BLOCK = 256
SMALL_BLOCK = 32
"""Of IQ4_NL."""

_RANGES = tuple(1 + 0.015 * step for step in range(-12, 13))
"""Of the codes, as shares of what would take in every weight of a group."""


def quantise(weight: Tensor, kind: str) -> Tensor:
    """``weight`` (rows, columns) as the bytes of a GGUF tensor (rows, blocks * bytes).

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: columns are not whole blocks of 256; of 32 for IQ4_NL.
    """
    rows, columns = weight.shape
    block = SMALL_BLOCK if kind == "IQ4_NL" else BLOCK
    if columns % block:
        raise ValueError(f"rows of {columns} are not whole blocks of {block}")
    return _ENCODERS[kind](weight.float().reshape(-1, block)).view(rows, -1)


def _signed_scales(groups: Tensor, most: int) -> Tensor:
    """The scale of each group (..., n) whose codes of -most to most - 1 come nearest to it."""
    index = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, index)
    counted = groups.square()
    best = torch.full_like(largest, -1.0)
    scale = torch.zeros_like(largest)
    for share in _RANGES:
        inverse = torch.where(largest == 0, 0.0, -most * share / largest)
        codes = (groups * inverse).round_().clamp_(-most, most - 1)
        together = (counted * groups * codes).sum(-1, keepdim=True)
        alone = (counted * codes.square()).sum(-1, keepdim=True)
        gain = torch.where(alone > 0, together.square() / alone, 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better & (alone > 0), together / alone, scale)
    return scale.squeeze(-1)


def _scales_and_minima(groups: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``scale * code - minimum`` that comes nearest to each group (..., n), codes 0 to ``most``,
    both not negative."""
    low = groups.amin(-1, keepdim=True).clamp_(max=0.0)
    span = groups.amax(-1, keepdim=True) - low
    counted = groups.square() + groups.square().mean(-1, keepdim=True)
    scale, minimum = span / most, -low
    best = torch.full_like(scale, torch.inf)
    for share in _RANGES:
        inverse = torch.where(span == 0, 0.0, most * share / span)
        codes = ((groups - low) * inverse).round_().clamp_(0, most)
        fitted, offset = _line(codes, groups, counted)
        error = (counted * (fitted * codes - offset - groups).square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, fitted, scale), torch.where(better, offset, minimum)
    return scale.squeeze(-1), minimum.squeeze(-1)


def _line(codes: Tensor, values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of ``values = scale * codes - minimum``, neither negative."""
    total, first = counted.sum(-1, keepdim=True), (counted * codes).sum(-1, keepdim=True)
    second = (counted * codes.square()).sum(-1, keepdim=True)
    sums = (counted * values).sum(-1, keepdim=True)
    products = (counted * codes * values).sum(-1, keepdim=True)
    spread = total * second - first.square()
    scale = torch.where(spread > 0, (total * products - first * sums) / spread, 0.0)
    minimum = (first * scale - sums) / total.clamp(min=1e-30)
    through_zero = torch.where(second > 0, products / second, 0.0)
    scale = torch.where(minimum < 0, through_zero, scale)
    return scale.clamp(min=0.0), minimum.clamp(min=0.0)


def _half_bytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 numbers (blocks, 1): their bytes, and what they are in fp32."""
    half = numbers.half()
    return half.view(torch.uint8), half.float()


def _codes(values: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The nearest codes of ``values / scales``; 0 where a scale is."""
    found = torch.where(scales == 0, torch.zeros_like(values), values / scales)
    return found.round_().clamp_(low, high)


def _joined(codes: Tensor) -> Tensor:
    """Codes (blocks, runs, 2, n) of 4 bits -> bytes (blocks, runs * n)."""
    return (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)


def _with_minima(blocks: Tensor, bits: int) -> Tensor:
    most = (1 << bits) - 1
    groups = blocks.view(-1, 8, 32)
    scales, minima = _scales_and_minima(groups, most)
    scale_bytes, scale = _half_bytes(scales.amax(1, keepdim=True) / 63)
    least_bytes, least = _half_bytes(minima.amax(1, keepdim=True) / 63)
    six, low = _codes(scales, scale, 0, 63), _codes(minima, least, 0, 63)
    shifted = groups + (least * low)[:, :, None]
    codes = _codes(shifted, (scale * six)[:, :, None], 0, most).to(torch.uint8)
    six, low = six.to(torch.uint8), low.to(torch.uint8)
    head = [
        scale_bytes,
        least_bytes,
        six[:, :4] | six[:, 4:] >> 4 << 6,
        low[:, :4] | low[:, 4:] >> 4 << 6,
        (six[:, 4:] & 15) | low[:, 4:] << 4,
    ]
    if bits == 5:
        place = torch.arange(8, dtype=torch.uint8)[:, None]
        head.append((codes >> 4 << place).sum(1, dtype=torch.uint8))
    return torch.cat([*head, _joined((codes & 15).view(-1, 4, 2, 32))], dim=1)


def _q6_k(blocks: Tensor) -> Tensor:
    groups = blocks.view(-1, 16, 16)
    scales = _signed_scales(groups, 32)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    scale_bytes, scale = _half_bytes(largest / -128)
    eight = _codes(scales, scale, -128, 127)
    codes = _codes(groups, (scale * eight)[:, :, None], -32, 31).add_(32).to(torch.uint8)
    upper = (codes >> 4).view(-1, 2, 4, 32)
    place = 2 * torch.arange(4, dtype=torch.uint8)[:, None]
    return torch.cat(
        [
            _joined((codes & 15).view(-1, 2, 2, 64)),
            (upper << place).sum(2, dtype=torch.uint8).flatten(1),
            eight.to(torch.int8).view(torch.uint8),
            scale_bytes,
        ],
        dim=1,
    )


def _quarters(codes: Tensor) -> Tensor:
    """Codes (blocks, 16, 16) of 2 bits -> bytes (blocks, 64): four rows of 32 in one."""
    place = 2 * torch.arange(4, dtype=torch.uint8)[:, None]
    return (codes.reshape(-1, 2, 4, 32) << place).sum(2, dtype=torch.uint8).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    groups = blocks.view(-1, 16, 16)
    scales, minima = _scales_and_minima(groups, 3)
    scale_bytes, scale = _half_bytes(scales.amax(1, keepdim=True) / 15)
    least_bytes, least = _half_bytes(minima.amax(1, keepdim=True) / 15)
    four, low = _codes(scales, scale, 0, 15), _codes(minima, least, 0, 15)
    shifted = groups + (least * low)[:, :, None]
    codes = _codes(shifted, (scale * four)[:, :, None], 0, 3).to(torch.uint8)
    nibbles = four.to(torch.uint8) | low.to(torch.uint8) << 4
    return torch.cat([nibbles, _quarters(codes), scale_bytes, least_bytes], dim=1)


def _q3_k(blocks: Tensor) -> Tensor:
    groups = blocks.view(-1, 16, 16)
    scales = _signed_scales(groups, 4)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    scale_bytes, scale = _half_bytes(largest / -32)
    six = _codes(scales, scale, -32, 31)
    codes = _codes(groups, (scale * six)[:, :, None], -4, 3).add_(4).to(torch.uint8)
    place = torch.arange(8, dtype=torch.uint8)[:, None]
    third = ((codes >> 2).view(-1, 8, 32) << place).sum(1, dtype=torch.uint8)
    six = six.add_(32).to(torch.uint8)
    upper = (six >> 4).view(-1, 4, 4)
    pairs = (upper << 2 * torch.arange(4, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8)
    nibbles = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    return torch.cat([third, _quarters(codes & 3), nibbles, pairs, scale_bytes], dim=1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    scale_bytes, rounded = _half_bytes(_point_scale(blocks))
    codes = _nearest(blocks, rounded).to(torch.uint8)
    return torch.cat([scale_bytes, _joined(codes.view(-1, 1, 2, 16))], dim=1)


def _iq4_xs(blocks: Tensor) -> Tensor:
    groups = blocks.view(-1, 8, 32)
    scales = _point_scale(groups).squeeze(-1)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    scale_bytes, scale = _half_bytes(largest / -32)
    six = _codes(scales, scale, -32, 31)
    codes = _nearest(groups, (scale * six)[:, :, None]).to(torch.uint8)
    six = six.add_(32).to(torch.uint8)
    place = 2 * torch.arange(4, dtype=torch.uint8)
    upper = ((six >> 4).view(-1, 2, 4) << place).sum(2, dtype=torch.uint8)
    lower = six[:, 0::2] & 15 | (six[:, 1::2] & 15) << 4
    return torch.cat([scale_bytes, upper, lower, _joined(codes.view(-1, 8, 2, 16))], dim=1)


def _point_scale(blocks: Tensor) -> Tensor:
    """The scale (..., 1) under which `POINTS` come nearest to each block (..., 32); the farthest
    point is negative."""
    index = blocks.abs().argmax(-1, keepdim=True)
    whole = blocks.gather(-1, index) / POINTS[0]
    counted = blocks.square()
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in _RANGES:
        points = POINTS[_nearest(blocks, whole / share)]
        together = (counted * blocks * points).sum(-1, keepdim=True)
        alone = (counted * points.square()).sum(-1, keepdim=True)
        gain = torch.where(alone > 0, together.square() / alone, 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better & (alone > 0), together / alone, scale)
    return scale


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """Indices of the points that come nearest to ``values / scale``."""
    turned = torch.where(scale == 0, torch.zeros_like(values), values / scale)
    between = (POINTS[1:] + POINTS[:-1]) / 2
    return torch.bucketize(turned, between)


POINTS = torch.tensor(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), dtype=torch.float32
)
"""IQ4_NL's, and IQ4_XS's."""

_ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": lambda blocks: _with_minima(blocks, 4),
        "Q5_K": lambda blocks: _with_minima(blocks, 5),
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)
KINDS = tuple(_ENCODERS)
