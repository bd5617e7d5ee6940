"""The video VAE against diffusers' own tiled one, bit for bit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3 as Original
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition
from PIL import Image

from penstock.engine.families.minimax_h3.pictures import fitted
from penstock.engine.families.minimax_h3.video_vae import config as configs
from penstock.engine.families.minimax_h3.video_vae import kind, tiny, vit
from penstock.engine.families.minimax_h3.video_vae.decode import denormalised
from penstock.engine.families.minimax_h3.video_vae.encode import encode_picture
from penstock.engine.families.minimax_h3.video_vae.modules import AutoencoderKLMiniMaxH3
from penstock.engine.families.minimax_h3.video_vae.tiles import Axis, Clips, Tiling
from penstock.engine.family.naming import ShapesOf
from penstock.engine.model.binding import bind, unbound
from penstock.errors import CheckpointError, UsageError

LATENT = (12, 17, 19)  # two clips of two rows and two columns of tiles


def twin(original: Any, **more: Any) -> Any:
    config = {k: v for k, v in original.config.items() if not k.startswith("_")} | more
    made = AutoencoderKLMiniMaxH3(config)
    bind(made, dict(original.state_dict()))
    assert not unbound(made)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    original = tiny.vae(request.param)
    return original, twin(original)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 4, *LATENT, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def wanted(pair: tuple[Any, Any], latents: torch.Tensor) -> torch.Tensor:
    """What diffusers decodes, (1, 3, frames, h, w)."""
    theirs, _ = pair
    with torch.inference_mode():
        found: torch.Tensor = theirs.decode(
            denormalised(latents, theirs.config), return_dict=False
        )[0]
    return found


def decoded(vae: Any, latents: torch.Tensor, size: int) -> torch.Tensor:
    """Frames in bytes, by groups of ``size`` tiles."""
    tiling = Tiling.of(vae.config, tuple(latents.shape[2:]))
    shape = tiling.clips.frames, tiling.rows.size, tiling.columns.size, 3
    video = torch.zeros(shape, dtype=torch.uint8)
    canvas, blocks = vit.Canvas(tiling, video), vae.decoder.transformer_blocks
    dtype = vae.decoder.proj_out.weight.dtype
    with torch.inference_mode():
        waves = vit.rope(tiling, vae.config, dtype, "cpu")
        given = denormalised(latents, vae.config)
        for group in vit.groups(tiling, size):
            hidden = [vit.enter(vae, vit.cut(given, tiling, tile)) for tile in group]
            vit.through(enumerate(blocks), hidden, waves)
            for tile, states in zip(group, hidden, strict=True):
                canvas.lay(tile, vit.leave(vae, states, tiling))
    return video


def as_bytes(wanted: torch.Tensor) -> torch.Tensor:
    """As the pipeline turns pixels into pictures."""
    mean, deviation = (
        torch.tensor(each).view(1, 3, 1, 1, 1) for each in (vit.PIXEL_MEAN, vit.PIXEL_STD)
    )
    unit = (wanted.float() * deviation + mean).clamp(0, 1)
    return (unit * 255).round().byte()[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("size", [1, 3])
def test_frames_are_those_of_tiled_decoding(
    pair: tuple[Any, Any], latents: torch.Tensor, wanted: torch.Tensor, size: int
) -> None:
    assert torch.equal(decoded(pair[1], latents, size), as_bytes(wanted))


def test_clips_are_those_of_tiled_decoding_before_they_are_rounded(
    pair: tuple[Any, Any], latents: torch.Tensor
) -> None:
    theirs, ours = pair
    tiling = Tiling.of(ours.config, LATENT)
    waves = vit.rope(tiling, ours.config, ours.decoder.proj_out.weight.dtype, "cpu")
    mosaic, found = vit.Mosaic(tiling.rows, tiling.columns), None
    with torch.inference_mode():
        for tile in list(tiling.tiles())[:4]:
            hidden = [vit.enter(ours, vit.cut(latents, tiling, tile))]
            vit.through(enumerate(ours.decoder.transformer_blocks), hidden, waves)
            found = mosaic.lay(tile.row, tile.column, vit.leave(ours, hidden[0], tiling))
        whole = theirs._decode_clip(latents[:, :, :7].to(theirs.post_quant_conv.weight.dtype))
    assert found is not None and torch.equal(found, whole)


def test_a_picture_smaller_than_a_tile(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    latents = torch.randn(1, 4, 7, 2, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        given = denormalised(latents, theirs.config)
        found = decoded(ours, latents, 9)
        assert torch.equal(found, as_bytes(theirs.decode(given, return_dict=False)[0]))
    assert found.shape == (22, 32, 48, 3)


@pytest.mark.parametrize("size", [(32, 64), (272, 320)])
def test_pictures_become_the_pipelines_latents(
    pair: tuple[Any, Any], size: tuple[int, int]
) -> None:
    theirs, ours = pair
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    with torch.inference_mode():
        pixels = frame.permute(2, 0, 1)[None, :, None]
        wanted = encode_vae_condition(theirs, pixels, vit.PIXEL_MEAN, vit.PIXEL_STD)
        found = encode_picture(ours, frame)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_files_of_the_makers_compute_the_same(pair: tuple[Any, Any], latents: torch.Tensor) -> None:
    """Queries, keys and values in one matrix, head by head, and gates first."""
    original, plain = pair
    weights = dict(original.state_dict())
    heads, head = 2, 16
    for index in range(2):
        start = f"{kind.BLOCK}{index}."
        for end in ("weight", "bias"):
            parts = [weights.pop(f"{start}attn.to_{name}.{end}") for name in "qkv"]
            split = [part.view(heads, head, *part.shape[1:]) for part in parts]
            weights[f"{start}attn.to_qkv.{end}"] = torch.cat(split, dim=1).flatten(0, 1)
            value, gate = weights[f"{start}ff.net.0.proj.{end}"].chunk(2)
            weights[f"{start}ff.net.0.proj.{end}"] = torch.cat([gate, value])
    config = dict(plain.config) | {"fused": True}
    made = AutoencoderKLMiniMaxH3(config)
    assert {k: tuple(v.shape) for k, v in weights.items()} == kind.shapes(config)
    bind(made, weights)
    # One product in the place of three may round otherwise
    assert (decoded(made, latents, 3).int() - decoded(plain, latents, 3).int()).abs().max() <= 2


def test_tiles_are_those_of_diffusers() -> None:
    holder: Any = SimpleNamespace(spatial_compression_ratio=16)
    for size in range(16, 1400, 16):
        starts, lengths, overlaps = Original._split_tiles(holder, size, 256, 64)
        axis = Axis.over(size, 16)
        assert (list(axis.starts), list(axis.overlaps)) == (starts, overlaps)
        assert [axis.length] * axis.count == lengths and axis.size == size


def test_clips_count_the_frames() -> None:
    for n in range(1, 21):
        clips = Clips.of(configs.VAE, 5 * n + 2)
        assert (clips.count, clips.frames) == (n, 17 * n + 5)
    for wrong in (2, 8, 36):
        with pytest.raises(UsageError, match="whole number of clips"):
            Clips.of(configs.VAE, wrong)


def test_shapes_and_what_they_tell(pair: tuple[Any, Any]) -> None:
    original, _ = pair
    config = {k: v for k, v in original.config.items() if not k.startswith("_")}
    kind.VAE.check("x", config)
    wanted = {name: tuple(each.shape) for name, each in original.state_dict().items()}
    assert kind.shapes(config) == wanted
    single = {name for name, each in original.state_dict().items() if kind.keeps_single(name)}
    assert all(original.state_dict()[name].dtype == torch.float32 for name in single)
    true = dict(configs.VAE)
    told = kind.VAE.derive(ShapesOf("x", kind.shapes(true)))
    assert kind.shapes(told) == kind.shapes(true)
    fused = kind.shapes(true | {"fused": True})
    assert kind.VAE.derive(ShapesOf("x", fused))["fused"]


def test_the_makers_names() -> None:
    naming = next(each for each in kind.NAMINGS if each.author == "ComfyUI")
    wanted = kind.shapes(dict(configs.VAE) | {"fused": True})
    inside = {new: old for old, new in (naming.inside or {}).items()}
    outside = {new: old for old, new in naming.outside.items()}
    for name in wanted:
        start, local = "", name
        if name.startswith(kind.BLOCK):
            number = name.removeprefix(kind.BLOCK).partition(".")[0]
            start = f"{kind.BLOCK}{number}."
            local = name.removeprefix(start)
        table = inside if start else outside
        path = max((each for each in table if local.startswith(each)), key=len)
        assert naming.rename(start + table[path] + local.removeprefix(path)) == name


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("latents_mean", [0.0], "24 entries"),
        ("norm_num_groups", 48, "48 groups"),
        ("token_drop", 5, "below 5"),
        ("spatial_padding_mode", "circular", "reflect or replicate"),
    ],
)
def test_another_config_is_refused(entry: str, value: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        kind.VAE.check("x", {**configs.VAE, entry: value})


@pytest.mark.parametrize("size", [(50, 50), (300, 100), (96, 64), (1001, 333)])
def test_pictures_are_fitted_as_the_pipeline_fits_them(size: tuple[int, int]) -> None:
    from diffusers.image_processor import VaeImageProcessor

    width, height = 96, 64
    draw = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(draw)
    stretched = VaeImageProcessor(vae_scale_factor=16).resize(picture, height=height, width=width)
    assert np.array_equal(fitted(picture, width, height, covers=False), np.array(stretched))
    covered = fitted(picture, width, height, covers=True).numpy()
    scale = max(width / size[0], height / size[1])
    wide, high = max(width, round(size[0] * scale)), max(height, round(size[1] * scale))
    box = math.floor((wide - width) / 2), math.floor((high - height) / 2)
    cut = picture if size == (width, height) else picture.resize(
        (wide, high), Image.Resampling.LANCZOS
    ).crop((*box, box[0] + width, box[1] + height))  # fmt: skip
    assert np.array_equal(covered, np.array(cut))
