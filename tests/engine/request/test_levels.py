"""The makers' noise levels, by their formula."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.engine.request.generation import SAMPLERS
from penstock.engine.request.levels import noise_levels, timesteps
from tests.makers import makers_levels

# Of the makers' own scheduler, run once: 40 steps of UniPC, shift 5
UNIPC_40_5 = [
    999, 994, 989, 983, 978, 972, 965, 959, 952, 944, 937, 929, 920, 911, 902, 892, 882, 870, 859,
    846, 833, 818, 803, 786, 768, 749, 728, 706, 681, 654, 624, 591, 555, 514, 468, 416, 356, 288,
    208, 113,
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "first"), [("unipc", 0.999), ("dpm++", 1.0)])
def test_the_levels_are_the_makers(sampler: str, first: float) -> None:
    for steps in range(4, 51):
        for shift in (*range(1, 13), 7.3):
            expected = makers_levels(first, steps, shift)
            found = noise_levels(sampler, steps, shift)
            assert np.abs(np.array(found) - expected).max() <= 1e-7
            told = timesteps(found, sampler)
            assert list(told) == (expected * 1000).astype(int).tolist()
            assert all(isinstance(each, int) for each in told)


def test_the_40_steps_of_unipc_at_shift_5() -> None:
    assert list(timesteps(noise_levels("unipc", 40, 5.0), "unipc")) == UNIPC_40_5


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_fall_from_1_at_most_and_never_reach_0(sampler: str, distilled: bool) -> None:
    for steps in (1, 2, 5, 200):
        levels = noise_levels(sampler, steps, 3.0, distilled=distilled)
        assert len(levels) == steps
        assert 0.99 < levels[0] <= 1
        assert levels[-1] > 0
        assert all(after < before for before, after in zip(levels, levels[1:], strict=False))
