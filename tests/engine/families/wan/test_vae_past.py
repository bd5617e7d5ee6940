"""The causal past of a decoding lies in memory that is taken once, whatever the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.engine.families.wan import vae_decode, vae_layers
from penstock.engine.families.wan.vae_decode import decode_tiled
from penstock.profiles.tiling import TileGrid
from tests.engine.families.wan.test_vae_residual import a_vae
from tests.engine.families.wan.test_vae_tiles import Fresh, latents_of
from tests.engine.families.wan.tiny_vae import tiny_vae

GRID, TILES, FRAMES = TileGrid(2, 2), 4, 5
LAST = TILES - 1
MAKES = [tiny_vae, a_vae]


@pytest.mark.parametrize("make", MAKES)
def test_a_tile_after_others_has_the_bits_of_one_alone(make) -> None:
    vae, latents = make(num_res_blocks=1), latents_of((2, 7, 5))
    for dtype in (torch.float32, torch.bfloat16):
        vae, latents = vae.to(dtype), latents.to(dtype)
        pieces = {(p.tile, p.frame): p.pixels.clone() for p in decode_tiled(vae, latents, GRID)}
        alone = [*decode_tiled(vae, latents, GRID, skip={*range(TILES)} - {LAST})]
        assert len(alone) == FRAMES
        assert all(torch.equal(p.pixels, pieces[LAST, p.frame]) for p in alone)


def test_the_next_tile_takes_no_memory_but_for_its_pixels() -> None:
    pieces = decode_tiled(tiny_vae(num_res_blocks=1), latents_of((2, 7, 5)), GRID)
    for _ in range(FRAMES):
        next(pieces)
    with Fresh() as fresh:
        piece = next(pieces)
    assert piece.tile == 1
    assert {*fresh.living} == {piece.pixels.untyped_storage()}


@pytest.mark.parametrize("frames", [1, 2])
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
    places = [place for memory in shared._memories.values() for place in memory._places]
    assert places and all(
        place.untyped_storage().data_ptr() == shared._arena.data_ptr() for place in places
    )
