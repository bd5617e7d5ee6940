"""The benchmarks' K-quants are what gguf reads, near the weights, and nearer than older types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from benchmarks import kquants

ERRORS = {
    "Q6_K": 0.02, "Q5_K": 0.04, "Q4_K": 0.08, "Q3_K": 0.17, "Q2_K": 0.3, "IQ4_NL": 0.09,
    "IQ4_XS": 0.09,
}  # fmt: skip
"""Relative, root mean square, of Gaussian weights with outliers."""


def read(stored: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(np.array(quants.dequantize(stored.numpy(), GGMLQuantizationType[kind])))


def relative(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.fixture(scope="module")
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1024, generator=generator)
    weight[torch.rand(64, 1024, generator=generator) < 1e-3] *= 8
    return weight


@pytest.mark.parametrize("kind", ERRORS)
def test_gguf_reads_what_is_near_the_weights(weight: Tensor, kind: str) -> None:
    assert relative(read(kquants.quantise(weight, kind), kind), weight) < ERRORS[kind]


@pytest.mark.parametrize(
    ("kind", "older"), [("Q5_K", "Q5_0"), ("Q4_K", "Q4_0"), ("IQ4_NL", "Q4_0")]
)
def test_nearer_than_an_older_type_of_as_many_bytes(weight: Tensor, kind: str, older: str) -> None:
    stored = kquants.quantise(weight, kind)
    other = torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[older]))
    assert stored.nbytes == other.nbytes
    assert relative(read(stored, kind), weight) < 0.9 * relative(read(other, older), weight)


@pytest.mark.parametrize("kind", ERRORS)
def test_zeros_stay_and_one_sign_is_no_trouble(kind: str) -> None:
    weight = torch.zeros(3, 256)
    weight[1], weight[2] = torch.linspace(1, 2, 256), -torch.linspace(1, 2, 256)
    found = read(kquants.quantise(weight, kind), kind)
    assert torch.equal(found[0], weight[0])
    assert relative(found, weight) < ERRORS[kind]


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="192 are not whole blocks of 256"):
        kquants.quantise(torch.zeros(2, 192), "Q4_K")
    with pytest.raises(ValueError, match="40 are not whole blocks of 32"):
        kquants.quantise(torch.zeros(2, 40), "IQ4_NL")
