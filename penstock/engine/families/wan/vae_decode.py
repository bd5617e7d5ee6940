"""Exact tiled decoding with diffusers' `AutoencoderKLWan`: latents become frames, without seams.

`conv_in`, the mid block (it attends across the frame) and the first up block's residual blocks run
on whole latent frames, whose features are kept. The rest runs tile by tile, and within a tile frame
by frame, so that the causal past of one tile is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan import vae_residual
from penstock.engine.families.wan.vae_layers import (
    RESIDUAL_REACH,
    Past,
    Run,
    doubled_size,
    each_time,
    entered,
    head,
    joined_in_time,
    levels_of,
    middle,
    once,
    one_frame,
    pointwise,
    residual,
    residuals,
    through,
)
from penstock.profiles.tiling import DecodeTile, TileGrid, Window, decode_tiles


@dataclass(frozen=True)
class Piece:
    """Pixels of one frame in one tile.

    Attributes:
        tile, tiles: index of the tile and their number.
        frame: index of the frame in the video.
        window: where the pixels go.
        pixels: (3, h, w) in [-1, 1], on the device, in the VAE's dtype.
    """

    tile: int
    tiles: int
    frame: int
    window: Window
    pixels: Tensor


@torch.no_grad()
def decode_tiled(
    vae: Any,
    latents: Tensor,
    grid: TileGrid,
    *,
    skip: Container[int] = (),
    should_stop: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """Decode ``latents`` tile by tile; the pieces cover every pixel of every frame exactly once.

    Args:
        vae: an `AutoencoderKLWan` of which `post_quant_conv` and `decoder` hold weights.
        latents: (1, z, t, h, w), already scaled and shifted back to the VAE's own range, of the
            VAE's dtype and on its device.
        grid: rows and columns of tiles.
        skip: indices of tiles that are not wanted.
        should_stop: called between units of work; ends the decoding by raising.

    Raises:
        CheckpointError: the VAE is not a Wan 2.1 VAE.
        UsageError: more tiles than latents along an axis.
    """
    height, width = latents.shape[-2:]
    arch = levels_of(vae)
    tiles = decode_tiles(arch, grid, height, width)
    features = []
    for feature in _whole_frames(vae, latents):
        features.append(feature)
        should_stop()
    wanted = [(index, tile) for index, tile in enumerate(tiles) if index not in skip]
    remembering = (_remembering(vae.decoder, tile) for _, tile in wanted)
    past = Past.of_tiles(features[0], remembering, len(features))
    for index, tile in wanted:
        past.forget()
        window = tile.output.scaled(arch.patch)
        for frame, pixels in enumerate(_tile_frames(vae.decoder, features, tile, past, arch.patch)):
            yield Piece(index, len(tiles), frame, window, pixels[0, :, 0])
            del pixels
            should_stop()


def raw_latents(latents: Tensor, config: Any) -> Tensor:
    """Return the latents (1, z, t, h, w) in the VAE's own range: its normalisation undone, rounded
    as diffusers' pipelines do."""
    view = (1, config.z_dim, 1, 1, 1)
    mean = torch.tensor(config.latents_mean).view(view).to(latents)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(view).to(latents)
    return latents / inverse_std + mean


def tile_windows(vae: Any, grid: TileGrid, height: int, width: int) -> list[Window]:
    """Return where the pixels of each tile go, for latents of ``height`` x ``width``.

    Raises:
        UsageError: more tiles than latents along an axis.
    """
    arch = levels_of(vae)
    return [tile.output.scaled(arch.patch) for tile in decode_tiles(arch, grid, height, width)]


def decode_frames(
    vae: Any, latents: Tensor, grid: TileGrid, *, should_stop: Callable[[], None] = lambda: None
) -> Tensor:
    """Return the decoded video, uint8 (frames, height, width, 3) in RAM, as diffusers would round
    it.

    Arguments and errors are those of `decode_tiled`.
    """
    factor = levels_of(vae).factor
    frames = 1 + (latents.shape[2] - 1) * _temporal_factor(vae.decoder)
    size = latents.shape[3] * factor, latents.shape[4] * factor
    video = torch.empty((frames, *size, 3), dtype=torch.uint8)
    for piece in decode_tiled(vae, latents, grid, should_stop=should_stop):
        rows, cols = piece.window.inside(Window.whole(*size))
        video[piece.frame, rows, cols] = to_uint8(piece.pixels).cpu()
    return video


def to_uint8(pixels: Tensor) -> Tensor:
    """Return (3, h, w) in [-1, 1] to (h, w, 3) in 0..255, by diffusers' `VaeImageProcessor`
    arithmetic."""
    unit = (pixels * 0.5 + 0.5).clamp_(0, 1)
    return unit.float().mul_(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous()


def _temporal_factor(decoder: Any) -> int:
    return 1 << int(sum(decoder.temperal_upsample))


def _whole_frames(vae: Any, latents: Tensor) -> Iterator[Tensor]:
    """Return the features (1, c, 1, h, w) of each latent frame after the first up block's residual
    blocks."""
    past = Past()
    window, decoder = Window.whole(*latents.shape[-2:]), vae.decoder
    runs: Iterator[Run] = (once(latents[:, :, at : at + 1]) for at in range(latents.shape[2]))
    runs = through(each_time(partial(pointwise, vae.post_quant_conv)), runs)
    runs = entered(decoder.conv_in, past, None, runs)
    runs = middle(decoder.mid_block, past, window, runs)
    if vae.config["is_residual"]:
        return vae_residual.whole_frames(decoder, past, _frames(runs), window)
    return _frames(residuals(decoder.up_blocks[0].resnets, past, window, runs))


def _remembering(decoder: Any, tile: DecodeTile) -> Iterator[tuple[Any, Window]]:
    """Yield the causal convolutions of a tile and the window that each sees."""
    for upper, windows in zip(decoder.up_blocks[1:], tile.levels, strict=True):
        for index, block in enumerate(upper.resnets):
            yield block.conv1, windows[2 * index]
            yield block.conv2, windows[2 * index + 1]
    yield decoder.conv_out, tile.levels[-1][-2]


def _tile_frames(
    decoder: Any, features: Sequence[Tensor], tile: DecodeTile, past: Past, patch: int = 1
) -> Iterator[Tensor]:
    """Return all frames of one tile, (1, 3, 1, h, w) each."""
    if hasattr(decoder.up_blocks[0], "avg_shortcut"):
        frames = vae_residual.tile_frames(decoder, features, tile, past)
        if patch > 1:
            frames = map(partial(vae_residual.unpatched, patch=patch), frames)
    else:
        frames = _plain_frames(decoder, features, tile, past)
    return map(partial(torch.clamp_, min=-1.0, max=1.0), frames)


def _plain_frames(
    decoder: Any, features: Sequence[Tensor], tile: DecodeTile, past: Past
) -> Iterator[Tensor]:
    whole = Window.whole(*features[0].shape[-2:])
    rows, cols = tile.tail.inside(whole)
    runs: Iterator[Run] = (once(feature[..., rows, cols]) for feature in features)
    low = tile.tail
    for lower, upper, windows in zip(
        decoder.up_blocks, decoder.up_blocks[1:], tile.levels, strict=False
    ):
        upsampler = lower.upsamplers[0]
        runs = _doubled_rate(upsampler, past, runs)
        enlarge = partial(doubled_size, upsampler, past, low, windows[0])
        runs = through(each_time(enlarge), runs)
        for index, block in enumerate(upper.resnets):
            span = windows[2 * index : 2 * index + 3]
            runs = through(partial(residual, block, past, span), runs, RESIDUAL_REACH)
        low = windows[2 * len(upper.resnets)]
    return _frames(head(decoder, past, tile.levels[-1][-2:], runs))


def _frames(runs: Iterator[Run]) -> Iterator[Tensor]:
    """Return the frames of ``runs``, of which none comes again: latents all differ."""
    return map(itemgetter(0), runs)


def _doubled_rate(upsampler: Any, past: Past, runs: Iterator[Run]) -> Iterator[Run]:
    """Yield two frames for each one after the first, where the upsampler works in time too.

    diffusers' marker "Rep" says the same: the first frame passes by, and the second meets zeros.
    """
    if upsampler.mode != "upsample3d":
        yield from runs
        return
    yield next(runs)
    seen: list[Tensor] = []  # themselves: the first level's are views of the features
    for run in runs:
        seen.append(run[0])
        del run
        halves = list(one_frame(upsampler.time_conv, joined_in_time(past, seen)).chunk(2, dim=1))
        while halves:
            yield once(halves.pop(0))
