"""What a convolution allocates on a CPU, against torch's own count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from penstock.engine.families.wan.cost.convolution import call_bytes
from penstock.engine.families.wan.vae_layers import one_frame
from tests.meter import allocated_peak

DTYPES = (torch.float32, torch.bfloat16)


def both(channels: tuple[int, int], side: int, kernel: int, dtype: torch.dtype) -> tuple[int, int]:
    """Allocated and predicted bytes of one convolution."""
    x = torch.zeros(1, channels[0], side, side, dtype=dtype)
    weight = torch.zeros(channels[1], channels[0], kernel, kernel, dtype=dtype)
    bias = torch.zeros(channels[1], dtype=dtype)
    area, taps = side * side, kernel * kernel
    with torch.no_grad():
        peak = allocated_peak(lambda: F.conv2d(x, weight, bias, padding=kernel // 2))
    return peak, call_bytes(channels, area, area, taps, x.itemsize)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.integers(1, 70),
    st.sampled_from([1, 3]),
    st.sampled_from(DTYPES),
)
@example((20, 32), 32, 3, torch.float32)  # the largest that torch does itself
@example((21, 32), 32, 3, torch.float32)
@example((1, 49), 27, 1, torch.bfloat16)  # without a matrix unit: sums in fp32, a bias to pad
@example((42, 67), 70, 1, torch.bfloat16)
def test_never_more_than_predicted(channels, side, kernel, dtype) -> None:
    peak, predicted = both(channels, side, kernel, dtype)
    assert peak <= predicted


@pytest.mark.parametrize("channels, side", [((48, 16), 96), ((192, 64), 48), ((288, 96), 64)])
def test_the_sizes_of_a_vae_take_what_is_predicted(channels, side) -> None:
    peak, predicted = both(channels, side, 3, torch.float32)
    assert 0.98 * predicted <= peak <= predicted


def test_a_frame_of_three_is_not_copied_for_every_tap() -> None:
    """torch's own 3D convolution of the same numbers does that."""
    x, conv = torch.randn(1, 16, 3, 64, 96), nn.Conv3d(16, 16, 3)
    with torch.no_grad():
        ours = allocated_peak(lambda: one_frame(conv, x, (1, 1)))
        theirs = allocated_peak(lambda: F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1)))
        torch.testing.assert_close(
            one_frame(conv, x, (1, 1)), F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
        )
    assert ours < 2 * x.nbytes < 9 * x.nbytes < theirs
