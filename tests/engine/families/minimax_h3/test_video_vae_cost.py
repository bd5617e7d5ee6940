"""What the video VAE is planned to take against what it takes, at the true shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.minimax_h3.video_vae import config as configs
from penstock.engine.families.minimax_h3.video_vae import cost, kind, vit
from penstock.engine.families.minimax_h3.video_vae.encode import encode_tiles, normed
from penstock.engine.families.minimax_h3.video_vae.modules import AutoencoderKLMiniMaxH3
from penstock.engine.families.minimax_h3.video_vae.spec import _spec, true_vae
from penstock.errors import RequestError
from penstock.profiles.manifest import Storage, Weights
from penstock.profiles.policy import Limits
from penstock.units import GIB
from tests.engine.families.minimax_h3.test_text_cost import case_of
from tests.meter import StorageMeter

TYPES = {2: torch.bfloat16, 4: torch.float32}
LATENT = (37, 48, 84)


def filled(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Its weights, made now, in fp32 where they stay so."""
    for path, owner in module.named_modules():
        for name, each in owner._parameters.items():
            if each is not None:
                single = kind.keeps_single(f"{path}.{name}")
                made = torch.empty(each.shape, dtype=torch.float32 if single else dtype)
                owner._parameters[name] = nn.Parameter(made, requires_grad=False)
    return list(module.parameters())


@pytest.mark.parametrize("item", [2, 4])
def test_a_tile_through_the_decoder(item: int) -> None:
    spec, dtype = true_vae(), TYPES[item]
    tiling = spec.tiling(LATENT)
    with FakeTensorMode(), torch.inference_mode():
        vae = AutoencoderKLMiniMaxH3({"decoder_num_layers": 1}, encodes=False)
        weights, latents = filled(vae, dtype), torch.empty(1, 24, *LATENT)
        tiles = list(tiling.tiles())[:3]
        with StorageMeter([*weights, latents]) as meter:
            waves = vit.rope(tiling, vae.config, dtype, "cpu")
            hidden = [vit.enter(vae, vit.cut(latents, tiling, tile)) for tile in tiles]
            vit.through(enumerate(vae.decoder.transformer_blocks), hidden, waves)
            for _ in tiles:
                vit.leave(vae, hidden.pop(0), tiling)
    planned = cost.held_bytes(spec, tiling, 3) + cost.tile_bytes(spec, tiling, item)
    assert meter.peak <= planned <= 1.05 * meter.peak


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 4), st.sampled_from([16, 32]), st.integers(1, 5), st.integers(1, 4),
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 4]),
)  # fmt: skip
def test_a_tile_is_never_under(
    heads: int, head: int, mult: int, registers: int, rows: int, columns: int, item: int
) -> None:
    config = {
        "decoder_num_attention_heads": heads, "decoder_attention_head_dim": head,
        "decoder_ffn_mult": mult, "decoder_num_register_tokens": registers,
        "decoder_num_layers": 1, "decoder_rope_dim_ratio": 0.75 if head == 16 else 0.375,
    }  # fmt: skip
    nothing = Weights(0, (), item)
    spec = _spec(config, nothing, nothing, Storage())
    tiling, dtype = spec.tiling((7, rows, columns)), TYPES[item]
    with FakeTensorMode(), torch.inference_mode():
        vae = AutoencoderKLMiniMaxH3(config, encodes=False)
        weights, latents = filled(vae, dtype), torch.empty(1, 24, 7, rows, columns)
        (tile,) = tiling.tiles()
        with StorageMeter([*weights, latents]) as meter:
            waves = vit.rope(tiling, vae.config, dtype, "cpu")
            hidden = [vit.enter(vae, vit.cut(latents, tiling, tile))]
            vit.through(enumerate(vae.decoder.transformer_blocks), hidden, waves)
            vit.leave(vae, hidden[0], tiling)
    assert meter.peak <= cost.held_bytes(spec, tiling, 1) + cost.tile_bytes(spec, tiling)


@pytest.mark.parametrize("size", [(256, 256), (768, 1344), (128, 96)])
def test_a_picture_through_the_encoder(size: tuple[int, int]) -> None:
    spec = true_vae()
    with FakeTensorMode(), torch.inference_mode():
        vae = AutoencoderKLMiniMaxH3({}, decodes=False)
        weights = filled(vae, torch.bfloat16)
        with StorageMeter(weights) as meter:
            frame = torch.empty(*size, 3, dtype=torch.uint8)
            encode_tiles(vae, normed(frame))
    planned = cost.encode_bytes(spec, *size)
    assert meter.peak <= planned <= 1.05 * meter.peak


@pytest.mark.parametrize("latent", [LATENT, (37, 30, 54), (22, 4, 2), (12, 16, 20)])
@pytest.mark.parametrize("item", [2, 4])
def test_tiles_laid_into_frames(latent: tuple[int, int, int], item: int) -> None:
    tiling = true_vae().tiling(latent)
    clips = tiling.clips
    with FakeTensorMode(), torch.inference_mode():
        shape = clips.frames, tiling.rows.size, tiling.columns.size, 3
        video = torch.empty(shape, dtype=torch.uint8)
        canvas = vit.Canvas(tiling, video)
        deep = clips.length * clips.factor
        with StorageMeter([video]) as meter:
            for tile in list(tiling.tiles())[: 2 * tiling.rows.count * tiling.columns.count]:
                sides = tiling.rows.length, tiling.columns.length
                canvas.lay(tile, torch.empty(1, 3, deep, *sides, dtype=TYPES[item]))
    planned = cost.canvas_bytes(tiling, item)
    assert meter.peak <= planned
    assert latent != LATENT or planned <= 1.05 * meter.peak


def test_the_vae_without_files_is_as_large_as_the_published_one() -> None:
    spec = true_vae()
    stored: Any = sum(spec.decoder.block_bytes) + spec.decoder.rest_bytes
    assert stored == pytest.approx(4.85e9, rel=1e-2)
    assert stored + spec.encoder.rest_bytes == pytest.approx(5.57e9, rel=1e-2)
    tiling = spec.tiling(LATENT)
    assert (tiling.count, cost.tokens_of(spec, tiling)) == (196, 1797)
    assert dict(configs.VAE)["decoder_num_layers"] == len(spec.decoder.block_bytes)


@pytest.mark.parametrize(("vram", "most"), [(2, 2), (4, 1), (1, 8)])
def test_the_decoder_is_read_a_few_times_not_once_a_tile(vram: int, most: int) -> None:
    """196 tiles: as they are called one by one, its blocks would be read 196 times."""
    case = case_of("int8", 0)
    found = cost.decode_step(case).best(Limits(vram * GIB, 16 * GIB, None))
    assert found is not None
    (phase,) = found
    groups, size = phase.tiles
    assert groups * size >= 196 and phase.vram_bytes <= vram * GIB
    decoder = case.manifest.vae.decoder
    assert phase.read_bytes <= decoder.rest_bytes + max(1, most) * sum(decoder.block_bytes)


def test_other_tiles_are_refused() -> None:
    case = case_of("int8", 0)
    with pytest.raises(RequestError, match="makers' own"):
        cost.decode_step(replace(case, policy=replace(case.policy, tiles=(2, 2))))
