"""The VAE of Wan2.2 TI2V: tiles equal whole frames, halos are as wide as they must be and no wider,
and what it takes is predicted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from penstock.engine.families.wan import modules, vae_decode, vae_encode, vae_residual
from penstock.engine.families.wan.cost.vae import (
    decode_bytes,
    decode_work,
    encode_bytes,
    encode_work,
)
from penstock.engine.families.wan.spec import VaeSpec
from penstock.engine.families.wan.vae_decode import decode_frames, decode_tiled
from penstock.engine.families.wan.vae_encode import encode_tiled, first_frame_then_zeros
from penstock.engine.model.binding import bind, unbound
from penstock.errors import RequestError
from penstock.profiles.manifest import Weights
from penstock.profiles.phases import FIRST_FRAME
from penstock.profiles.tiling import TileGrid, VaeLevels, Window, decode_tiles, encode_tiles
from tests.engine.families.wan.test_vae_tiles import (
    EXACT,
    SIDES,
    crop,
    latents_of,
    short_decode_tile,
    short_encode_tile,
)
from tests.engine.families.wan.tiny_vae import tiny_vae, whole_decode, whole_encode
from tests.meter import StorageMeter

CASES = [
    # num_res_blocks, latents (t, h, w), grid
    (2, (1, 3, 4), (1, 1)),
    (1, (3, 5, 7), (2, 2)),
    (2, (2, 6, 5), (3, 2)),
]


def a_vae(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    given = {"base_dim": 4, "decoder_base_dim": 6, "is_residual": True, "patch_size": 2}
    return tiny_vae(dtype, **(given | {"in_channels": 12, "out_channels": 12} | config))


def picture_of(height: int, width: int) -> Tensor:
    draw = torch.Generator().manual_seed(8)
    return torch.rand(1, 3, 1, height, width, generator=draw, dtype=torch.float64) * 2 - 1


def assembled(vae: Any, latents: Tensor, grid: TileGrid) -> Tensor:
    """The tiled video as floats; pixels that no piece reached are NaN."""
    frames = 1 + 4 * (latents.shape[2] - 1)
    height, width = (16 * side for side in latents.shape[-2:])
    video = torch.full((3, frames, height, width), torch.nan, dtype=latents.dtype)
    for piece in decode_tiled(vae, latents, grid):
        rows, cols = piece.window.inside(Window.whole(height, width))
        assert video[:, piece.frame, rows, cols].isnan().all()
        video[:, piece.frame, rows, cols] = piece.pixels
    return video[None]


@pytest.mark.parametrize(("blocks", "shape", "grid"), CASES)
def test_decoded_tiles_equal_whole_frames(blocks: int, shape: Any, grid: Any) -> None:
    vae, latents = a_vae(num_res_blocks=blocks), latents_of(shape)
    whole = whole_decode(vae, latents)
    assert 0.01 < whole.std() < 0.8 and (whole.abs() == 1).float().mean() < 0.2
    assert (assembled(vae, latents, TileGrid(*grid)) - whole).abs().max() < EXACT


@pytest.mark.parametrize(("blocks", "shape", "grid"), CASES)
def test_an_encoded_picture_equals_the_whole(blocks: int, shape: Any, grid: Any) -> None:
    vae, picture = a_vae(num_res_blocks=blocks), picture_of(16 * shape[1], 16 * shape[2])
    tiled = encode_tiled(vae, crop(picture), picture.shape[2:], TileGrid(*grid))
    whole = whole_encode(vae, picture)
    assert tiled.shape == whole.shape and whole.std() > 0.05
    assert (tiled - whole).abs().max() < EXACT


@pytest.mark.parametrize(("axis", "side"), SIDES)
@pytest.mark.parametrize("level", [0, 3])
def test_decoding_breaks_with_a_halo_one_short(
    monkeypatch: pytest.MonkeyPatch, level: int, axis: str, side: str
) -> None:
    size, grid = (13, 12), TileGrid(2, 2)
    vae, latents = a_vae(num_res_blocks=1, base_dim=2, decoder_base_dim=4), latents_of((1, *size))
    whole = whole_decode(vae, latents)
    tiles = decode_tiles(VaeLevels(4, 1, 2), grid, *size)
    short = [short_decode_tile(tile, level, axis, side, size) for tile in tiles]
    assert short != tiles and [t.output for t in short] == [t.output for t in tiles]
    monkeypatch.setattr(vae_decode, "decode_tiles", lambda *_: short)
    try:
        found = assembled(vae, latents, grid)
    except (RuntimeError, IndexError):
        return  # the shortcut has too few pixels to add
    assert (found - whole).abs().max() > EXACT


@pytest.mark.parametrize(("axis", "side"), SIDES)
def test_encoding_breaks_with_a_halo_one_short(
    monkeypatch: pytest.MonkeyPatch, axis: str, side: str
) -> None:
    size, grid = (9, 8), TileGrid(2, 2)
    vae, picture = a_vae(num_res_blocks=1, base_dim=2), picture_of(16 * size[0], 16 * size[1])
    tiles = encode_tiles(VaeLevels(4, 1, 2), grid, *size)
    short = [short_encode_tile(tile, 0, axis, side, size) for tile in tiles]
    assert short != tiles
    monkeypatch.setattr(vae_encode, "encode_tiles", lambda *_: short)
    tiled = encode_tiled(vae, crop(picture), picture.shape[2:], grid)
    assert (tiled - whole_encode(vae, picture)).abs().max() > EXACT


def test_patches_are_those_of_diffusers() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

    picture = picture_of(8, 12)
    there = vae_residual.patched(picture, 2)
    assert torch.equal(there, patchify(picture, 2))
    assert torch.equal(vae_residual.unpatched(there, 2), unpatchify(there, 2))
    assert torch.equal(vae_residual.unpatched(there, 2), picture)


def test_our_modules_compute_what_those_of_diffusers_do() -> None:
    theirs = a_vae(torch.float32)
    ours = modules.AutoencoderKLWan(**dict(theirs.config))
    bind(ours, dict(theirs.state_dict()))
    assert not unbound(ours)
    latents, picture = latents_of((2, 3, 4), torch.float32), picture_of(48, 64).float()
    found, wanted = (decode_frames(vae, latents, TileGrid(2, 2)) for vae in (ours, theirs))
    assert torch.equal(found, wanted)
    found, wanted = (
        encode_tiled(vae, crop(picture), picture.shape[2:], TileGrid(1, 2))
        for vae in (ours, theirs)
    )
    assert torch.equal(found, wanted)


def test_a_clip_is_refused() -> None:
    with pytest.raises(RequestError, match="encodes a picture"):
        encode_tiled(a_vae(), crop(picture_of(32, 32)), (5, 32, 32), TileGrid(1, 1))


def cases() -> list[Any]:
    draw, none = random.Random(3), Weights(0, (), 2)
    found = []
    for number in range(4):
        spec = VaeSpec(
            none, none, draw.choice([2, 4, 8]), 4, (1, 2, 4, 4), draw.choice([1, 2]),
            (False, True, True), draw.choice([4, 6, 8, 16]), residual=True, patch=2,
        )  # fmt: skip
        latent = draw.choice([1, 2, 3, 4]), draw.choice([2, 3, 4, 6]), draw.choice([2, 4, 5])
        grid = TileGrid(draw.choice([1, 2]), draw.choice([1, 2]))
        found.append((spec, latent, grid, (torch.float32, torch.bfloat16)[number % 2]))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_what_it_takes_never_passes_the_prediction(case: Any) -> None:
    spec, latent, grid, dtype = case
    itemsize, single = dtype.itemsize, (1, *latent[1:])
    vae = a_vae(
        dtype, base_dim=spec.base_dim, decoder_base_dim=spec.decoder_dim,
        num_res_blocks=spec.num_res_blocks,
    )  # fmt: skip
    size = 16 * latent[1], 16 * latent[2]

    def decode() -> None:
        for piece in decode_tiled(vae, torch.zeros(1, 4, *latent, dtype=dtype), grid):
            del piece

    def encode() -> None:
        picture = torch.zeros(3, *size, dtype=dtype)
        source = first_frame_then_zeros(picture)
        encode_tiled(vae, source, (1, *size), grid, changes=FIRST_FRAME)

    for run, found, work in (
        (decode, decode_bytes(spec, latent, grid, itemsize), decode_work(spec, latent, grid)),
        (
            encode,
            encode_bytes(spec, single, grid, itemsize, changes=FIRST_FRAME),
            encode_work(spec, single, grid, changes=FIRST_FRAME),
        ),
    ):
        with (
            StorageMeter(vae.parameters()) as meter,
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):
            run()
        assert meter.peak <= found.device_bytes <= 1.25 * meter.peak
        assert counter.get_total_flops() == work.flops
