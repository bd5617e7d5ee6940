"""Writes ggml's types of 1 to 3 bits whose codes name points of a grid, and its NVFP4, which no
Python package writes, so that their quality can be measured.

A group's scale is searched over a few, by least squares, and each point is the nearest; ggml's own
search weighs errors by what the inputs do, so its files come nearer. Layouts: `ggml-common.h` of
ggml, read back by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from penstock.quant.values.ggml_tables import E2M1, grid

BLOCK = 256
NVFP4_BLOCK = 64
DELTA = 0.125
"""What IQ1's points are moved by, up or down."""

_SHARES = tuple(0.55 + 0.05 * step for step in range(12))
"""Of the scale under which the farthest point takes in the largest weight."""
_AT_ONCE = 1 << 14
"""Vectors that are compared with all points together."""


def quantise(weight: Tensor, kind: str) -> Tensor:
    """``weight`` (rows, columns) as the bytes of a GGUF tensor (rows, blocks * bytes).

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: columns are not whole blocks.
    """
    rows, columns = weight.shape
    block = NVFP4_BLOCK if kind == "NVFP4" else BLOCK
    if columns % block:
        raise ValueError(f"rows of {columns} are not whole blocks of {block}")
    return _ENCODERS[kind](weight.float().reshape(-1, block)).view(rows, -1)


@dataclass(frozen=True)
class Found:
    """Points of a grid for every block.

    Attributes:
        scale: fp16 of each block, (blocks, 1).
        steps: of the groups' scales, (blocks, groups), int64.
        index: of the points, (blocks, 256 / size), int64.
    """

    scale: Tensor
    steps: Tensor
    index: Tensor

    @property
    def scale_bytes(self) -> Tensor:
        """The block's scale as it is stored."""
        return self.scale.view(torch.uint8)


def _nearest(vectors: Tensor, points: Tensor) -> Tensor:
    """The index of the point (count, size) that is nearest to each vector (n, size)."""
    lengths = points.square().sum(1)
    parts = torch.split(vectors, _AT_ONCE)  # type: ignore[no-untyped-call]
    return torch.cat([(lengths - 2 * part @ points.t()).argmin(1) for part in parts])


def _fitted(targets: Tensor, points: Tensor, groups: int) -> Tensor:
    """The scale (blocks, groups) under which the points come nearest to ``targets``
    (blocks, 256)."""
    parts, size = targets.view(-1, groups, 256 // groups), points.shape[1]
    whole = parts.abs().amax(-1) / points.abs().max()
    best, scale = torch.full_like(whole, -1.0), torch.zeros_like(whole)
    for share in _SHARES:
        tried = (whole * share).clamp(min=1e-30)[:, :, None]
        index = _nearest((parts / tried).view(-1, size), points)
        found = points[index].view(parts.shape)
        together, alone = (parts * found).sum(-1), found.square().sum(-1)
        gain = torch.where(alone > 0, together.square() / alone, 0.0)
        better = (gain > best) & (together > 0)
        best = torch.where(better, gain, best)
        scale = torch.where(better, together / alone, scale)
    return scale


def _search(targets: Tensor, points: Tensor, step: Callable[[Tensor], Tensor], scales: Tensor,
            most: int) -> Found:  # fmt: skip
    """Blocks of ``step(code) * scale * point``, for the groups' scales as they were found."""
    codes = torch.arange(most + 1, device=targets.device)
    largest = scales.amax(1, keepdim=True)
    block = (largest / step(codes[-1:])).half()
    apart = (scales[:, :, None] - block.float()[:, :, None] * step(codes)).abs()
    steps = apart.argmin(-1)
    used = (block.float() * step(steps)).clamp(min=1e-30)[:, :, None]
    parts = targets.view(len(targets), scales.shape[1], -1) / used
    index = _nearest(parts.view(-1, points.shape[1]), points)
    return Found(block, steps, index.view(len(targets), -1))


def _even(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes (blocks, 256) and the seven signs of each eight (blocks, 32), int64: of an odd
    number of minus signs the one of the least weight is left out."""
    eights = blocks.view(-1, 32, 8)
    minus = eights < 0
    odd = minus.sum(-1) % 2 == 1
    least = torch.nn.functional.one_hot(eights.abs().argmin(-1), 8).bool() & odd[:, :, None]
    minus = minus ^ least
    magnitudes = torch.where(minus, -eights, eights).view(blocks.shape)
    return magnitudes, _fields(minus[:, :, :7].long(), 1)


def _signs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes and a byte of signs for each eight (blocks, 32), int64."""
    return blocks.abs(), _fields((blocks.view(-1, 32, 8) < 0).long(), 1)


def _fields(values: Tensor, width: int) -> Tensor:
    """(..., n) numbers of ``width`` bits as one, the first lowest: (...), int64."""
    place = width * torch.arange(values.shape[-1], device=values.device)
    return (values << place).sum(-1)


def _bytes(values: Tensor, count: int) -> Tensor:
    """Numbers (blocks, n) as ``count`` little-endian bytes each."""
    place = 8 * torch.arange(count, device=values.device)
    return (values[:, :, None] >> place & 255).to(torch.uint8).flatten(1)


def _packed(values: Tensor, width: int) -> Tensor:
    """Numbers (blocks, n) of ``width`` bits, so many to a byte, the first lowest."""
    return _bytes(_fields(values.view(len(values), -1, 8 // width), width), 1)


def _quarter(code: Tensor) -> Tensor:
    return (0.5 + code) * 0.25


def _points(kind: str) -> Tensor:
    return grid(kind, torch.device("cpu")).float()


def _low_high(found: Found, signs: Tensor) -> Tensor:
    """IQ2_XXS's and IQ3_XXS's tail: four times seven signs and a scale, in 32 bits."""
    return _fields(signs.view(len(signs), 8, 4), 7) | found.steps << 28


def _iq2_xxs(blocks: Tensor) -> Tensor:
    magnitudes, signs = _even(blocks)
    points = _points("IQ2_XXS")
    found = _search(magnitudes, points, _quarter, _fitted(magnitudes, points, 8), 15)
    words = torch.stack(
        [_fields(found.index.view(-1, 8, 4), 8), _low_high(found, signs)], dim=2
    ).flatten(1)
    return torch.cat([found.scale_bytes, _bytes(words, 4)], dim=1)


def _iq2_xs(blocks: Tensor) -> Tensor:
    magnitudes, signs = _even(blocks)
    points = _points("IQ2_XS")
    found = _search(magnitudes, points, _quarter, _fitted(magnitudes, points, 16), 15)
    codes = _bytes(found.index | signs << 9, 2)
    return torch.cat([found.scale_bytes, codes, _packed(found.steps, 4)], dim=1)


def _iq2_s(blocks: Tensor) -> Tensor:
    magnitudes, signs = _signs(blocks)
    points = _points("IQ2_S")
    found = _search(magnitudes, points, _quarter, _fitted(magnitudes, points, 16), 15)
    parts = [_bytes(found.index & 255, 1), _bytes(signs, 1), _packed(found.index >> 8, 2)]
    return torch.cat([found.scale_bytes, *parts, _packed(found.steps, 4)], dim=1)


def _iq3_xxs(blocks: Tensor) -> Tensor:
    magnitudes, signs = _even(blocks)
    points = _points("IQ3_XXS")
    scales = _fitted(magnitudes, points, 8)
    found = _search(magnitudes, points, lambda code: (0.5 + code) * 0.5, scales, 15)
    parts = [_bytes(found.index, 1), _bytes(_low_high(found, signs), 4)]
    return torch.cat([found.scale_bytes, *parts], dim=1)


def _iq3_s(blocks: Tensor) -> Tensor:
    magnitudes, signs = _signs(blocks)
    points = _points("IQ3_S")
    scales = _fitted(magnitudes, points, 8)
    found = _search(magnitudes, points, lambda code: 1.0 + 2 * code, scales, 15)
    parts = [_bytes(found.index & 255, 1), _packed(found.index >> 8, 1), _bytes(signs, 1)]
    return torch.cat([found.scale_bytes, *parts, _packed(found.steps, 4)], dim=1)


def _moved(blocks: Tensor, scales: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which of IQ1's two deltas comes nearer for each ``size`` numbers, and what is left for the
    grid in units of the scales (blocks, groups)."""
    unit = scales.clamp(min=1e-30).repeat_interleave(256 // scales.shape[1], 1)
    points, scaled = _points("IQ1_S"), blocks / unit
    errors = []
    for delta in (DELTA, -DELTA):
        near = points[_nearest((scaled - delta).view(-1, 8), points)].view(blocks.shape)
        errors.append((near + delta - scaled).square().view(len(blocks), -1, size).sum(-1))
    down = errors[1] < errors[0]
    shift = torch.where(down, -DELTA, DELTA).repeat_interleave(size, 1) * unit
    return down, blocks - shift


def _iq1(blocks: Tensor, groups: int, size: int) -> tuple[Found, Tensor]:
    points = _points("IQ1_S")
    scales = _fitted(blocks, points, groups)
    down, left = _moved(blocks, scales, size)
    return _search(left, points, lambda code: 1.0 + 2 * code, scales, 7), down.long()


def _iq1_s(blocks: Tensor) -> Tensor:
    found, down = _iq1(blocks, 8, 32)
    upper = _fields((found.index >> 8).view(-1, 8, 4), 3)
    heads = _bytes(upper | found.steps << 12 | down << 15, 2)
    return torch.cat([found.scale_bytes, _bytes(found.index & 255, 1), heads], dim=1)


def _iq1_m(blocks: Tensor) -> Tensor:
    found, down = _iq1(blocks, 16, 8)
    heads = _packed(found.index >> 8 | down << 3, 4)
    whole = found.scale.view(torch.int16).long()
    top = torch.cat([whole >> 4 * place & 15 for place in range(4)], dim=1)
    scales = _fields(found.steps.view(-1, 4, 4), 3) | top << 12
    return torch.cat([_bytes(found.index & 255, 1), heads, _bytes(scales, 2)], dim=1)


def _nvfp4(blocks: Tensor) -> Tensor:
    """Four groups of 16, each with a scale in e4m3."""
    groups = blocks.view(-1, 4, 16)
    code = (groups.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    unit = code.float()[:, :, None] / 2
    turned = torch.where(unit == 0, torch.zeros_like(groups), groups / unit)
    points = torch.tensor(E2M1, dtype=torch.float32)
    codes = (turned[..., None] - points).abs().argmin(-1).to(torch.uint8)
    joined = codes[:, :, :8] | codes[:, :, 8:] << 4
    return torch.cat([code.view(torch.uint8), joined.flatten(1)], dim=1)


_ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "IQ3_S": _iq3_s,
        "IQ3_XXS": _iq3_xxs,
        "IQ2_S": _iq2_s,
        "IQ2_XS": _iq2_xs,
        "IQ2_XXS": _iq2_xxs,
        "IQ1_M": _iq1_m,
        "IQ1_S": _iq1_s,
        "NVFP4": _nvfp4,
    }
)
KINDS = tuple(_ENCODERS)
