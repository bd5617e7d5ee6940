"""The true VAE at 720p, on fake tensors: the budget holds and the prediction is tight."""

from __future__ import annotations

import pytest
import torch

from penstock.engine.families.wan.cost.vae import decode_bytes, encode_bytes
from penstock.engine.families.wan.spec import VaeSpec
from penstock.profiles.manifest import Weights
from penstock.profiles.phases import FIRST_FRAME
from penstock.profiles.tiling import TileGrid
from penstock.units import GIB
from tests.engine.families.wan.fake_vae import FakeVae

LATENT = (21, 90, 160)
NONE = Weights(0, (), 2)
WAN = VaeSpec(NONE, NONE, 96, 16, (1, 2, 4, 4), 2, (False, True, True))


@pytest.fixture(scope="module")
def fake_vae() -> FakeVae:
    return FakeVae.make(torch.bfloat16)


def test_720p_decode_in_tiles_stays_below_1_2_gib(fake_vae) -> None:
    peak, grid = fake_vae.decode_peak(LATENT, TileGrid(3, 3)), TileGrid(3, 3)
    assert peak <= 1.2 * GIB
    assert peak <= decode_bytes(WAN, LATENT, grid, 2).device_bytes <= 1.05 * peak


def test_720p_encode_in_tiles_stays_below_1_2_gib(fake_vae) -> None:
    peak, grid = fake_vae.encode_peak(LATENT, TileGrid(2, 2)), TileGrid(2, 2)
    assert peak <= 1.2 * GIB
    predicted = encode_bytes(WAN, LATENT, grid, 2, changes=FIRST_FRAME).device_bytes
    assert peak <= predicted <= 1.05 * peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latent", "side"),
    [(LATENT, 1), ((21, 60, 104), 2), ((21, 60, 104), 3),
     *(pytest.param(LATENT, side, marks=pytest.mark.faults) for side in (2, 3, 4)),
     *(pytest.param((21, 60, 104), side, marks=pytest.mark.faults) for side in (1, 4))],
)  # fmt: skip
def test_predictions_at_the_true_shapes(fake_vae, latent, side) -> None:
    grid = TileGrid(side, side)
    peak = fake_vae.decode_peak(latent, grid)
    assert peak <= decode_bytes(WAN, latent, grid, 2).device_bytes <= 1.05 * peak
    for changes in (FIRST_FRAME, (0, 1, 80)):
        check_encoding(fake_vae, latent, grid, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latent", "side"),
    [pytest.param(LATENT, 2, marks=pytest.mark.faults),
     *(pytest.param((9, *LATENT[1:]), side, marks=pytest.mark.faults) for side in (1, 3, 4)),
     *(((9, 60, 104), side) for side in (1, 2, 3, 4))],
)  # fmt: skip
def test_predictions_where_every_frame_changes(fake_vae, latent, side) -> None:
    """Peaks do not grow with frames once the causal past is full: one of them has all 81."""
    changes = range(4 * latent[0] - 3)
    check_encoding(fake_vae, latent, TileGrid(side, side), changes)


def check_encoding(fake_vae, latent, grid, changes) -> None:
    peak = fake_vae.encode_peak(latent, grid, changes)
    predicted = encode_bytes(WAN, latent, grid, 2, changes=changes).device_bytes
    assert peak <= predicted <= 1.05 * peak
