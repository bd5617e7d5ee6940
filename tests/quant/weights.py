"""Weights that look like a trained linear's: Gaussian, sigma 0.02, with rare outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.formats.rows import Spec
from penstock.formats.tags import ITEM_BYTES

SIGMA = 0.02
OUTLIER = 0.74


def outlier_weight(rows: int = 1024, columns: int = 5120) -> Tensor:
    """Gaussian fp32 with one outlier of 37 sigma in three rows of a thousand."""
    generator = torch.Generator().manual_seed(1234)
    weight = torch.randn(rows, columns, generator=generator) * SIGMA
    for row in range(100, rows, 330):
        weight[row, 17 * row % columns] = OUTLIER
    return weight


def small_weight(rows: int = 48, columns: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian, sigma 0.02."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return (torch.randn(rows, columns, generator=generator) * SIGMA).to(dtype)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of ``wanted``."""
    difference = found.double() - wanted.double()
    return float(difference.square().mean().sqrt() / wanted.double().square().mean().sqrt())


def storage_bytes(storage: Mapping[str, Spec]) -> int:
    """Bytes of all tensors of one stored weight, without padding between them."""
    return sum(ITEM_BYTES[tag] * math.prod(shape) for tag, shape in storage.values())
