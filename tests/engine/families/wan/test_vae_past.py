"""The causal past of a decoding lies in memory that is taken once, whatever the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.families.wan import vae_decode, vae_layers
from penstock.engine.families.wan.vae_decode import decode_tiled
from penstock.profiles.tiling import TileGrid
from tests.engine.families.wan.test_vae_residual import a_vae
from tests.engine.families.wan.test_vae_tiles import Fresh, latents_of
from tests.engine.families.wan.tiny_vae import tiny_vae

GRID, TILES = TileGrid(3, 2), 6
MAKES = [tiny_vae, a_vae]


@pytest.fixture(params=MAKES, ids=["Wan2.1", "Wan2.2 TI2V"])
def given(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    return request.param(num_res_blocks=1), latents_of((3, 7, 5))


def test_a_tile_after_others_has_the_bits_of_one_alone(given: tuple[Any, Tensor]) -> None:
    vae, latents = given
    for dtype in (torch.float32, torch.bfloat16):
        vae, latents = vae.to(dtype), latents.to(dtype)
        pieces = {(p.tile, p.frame): p.pixels.clone() for p in decode_tiled(vae, latents, GRID)}
        for tile in (2, TILES - 1):
            alone = [*decode_tiled(vae, latents, GRID, skip={*range(TILES)} - {tile})]
            assert len(alone) == 9
            assert all(torch.equal(p.pixels, pieces[tile, p.frame]) for p in alone)


def test_the_next_tile_takes_no_memory_for_its_past(given: tuple[Any, Tensor]) -> None:
    pieces = decode_tiled(*given, GRID)
    for _ in range(9):
        next(pieces)
    with Fresh() as fresh:
        piece = next(pieces)
    assert piece.tile == 1
    del piece
    assert not fresh.living


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("make", MAKES)
def test_all_that_tiles_remember_is_there_before_the_first(make, frames, monkeypatch) -> None:
    """And no more: the largest tile fills it."""
    pasts, filled = [], []

    class Seen(vae_layers.Past):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pasts.append(self)

        def forget(self) -> None:
            filled.append(self._given)
            super().forget()

    monkeypatch.setattr(vae_decode, "Past", Seen)
    vae, room = make(num_res_blocks=1), None
    for piece in decode_tiled(vae, latents_of((frames, 7, 5)), GRID):
        room = room or pasts[-1]._room.numel() if piece.tile == 0 else room
    _, shared = pasts  # the first is of whole frames
    assert max(*filled, shared._given) == shared._arena.numel() > 0
    assert shared._room.numel() == room
