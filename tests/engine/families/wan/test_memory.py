from __future__ import annotations

import pytest

from benchmarks.fake_dit import diffusers_bytes, lean_bytes
from penstock.units import GIB

LATENT_720P = (21, 90, 160)


@pytest.mark.parametrize(("branches", "limit"), [(1, 2.6), (2, 3.3)])
def test_a_720p_forward_of_the_14b_model_is_lean(branches: int, limit: float) -> None:
    peak, _ = lean_bytes(LATENT_720P, 2048, branches, blocks=1)
    assert peak <= limit * GIB


def test_what_diffusers_needs_for_it() -> None:
    theirs, _ = diffusers_bytes(LATENT_720P, blocks=1)
    assert theirs > 7.5 * GIB
