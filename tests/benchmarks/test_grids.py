"""The benchmarks' grid types and NVFP4 are what gguf reads, and near the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from benchmarks import grids

ERRORS = {
    "IQ3_S": 0.15, "IQ3_XXS": 0.2, "IQ2_S": 0.28, "IQ2_XS": 0.32, "IQ2_XXS": 0.37, "IQ1_M": 0.45,
    "IQ1_S": 0.5, "NVFP4": 0.11,
}  # fmt: skip
"""Relative, root mean square, of Gaussian weights with outliers."""


def read(stored: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(np.array(quants.dequantize(stored.numpy(), GGMLQuantizationType[kind])))


@pytest.mark.parametrize("kind", grids.KINDS)
def test_gguf_reads_what_is_near_the_weights_and_zeros_stay(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 512, generator=generator)
    weight[torch.rand(8, 512, generator=generator) < 1e-3] *= 8
    weight[3] = 0
    found = read(grids.quantise(weight, kind), kind)
    assert not found[3].any()
    assert (found - weight).norm() / weight.norm() < ERRORS[kind]


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="192 are not whole blocks of 256"):
        grids.quantise(torch.zeros(2, 192), "IQ2_S")
    with pytest.raises(ValueError, match="40 are not whole blocks of 64"):
        grids.quantise(torch.zeros(2, 40), "NVFP4")
