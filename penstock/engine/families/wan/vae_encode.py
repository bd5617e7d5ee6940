"""Exact tiled encoding with diffusers' `AutoencoderKLWan`: pixels become latents, without seams.

The way down to the last downsampler runs tile by tile, and within a tile frame by frame; its
features, of latent size, are assembled. What attends across the frame (the mid block), and the
residual blocks before it, then run on whole latent frames. The pixels are asked for crop by crop:
the clip never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.families.wan.vae_layers import (
    Past,
    causal_conv,
    head,
    levels_of,
    middle,
    one_frame,
    pointwise,
    residual,
    residuals,
)
from penstock.errors import RequestError
from penstock.profiles.tiling import EncodeTile, TileGrid, Window, encode_tiles

PixelSource = Callable[[int, Window], Tensor]
"""Gives the pixels (1, 3, 1, h, w) in [-1, 1] of a frame's window, on the device, in the dtype."""


def first_frame_then_zeros(image: Tensor) -> PixelSource:
    """The conditioning clip of Wan's image-to-video: the picture, then frames of zeros.

    Args:
        image: (3, height, width) in [-1, 1], where the VAE is and of its dtype.
    """

    def pixels(frame: int, window: Window) -> Tensor:
        if frame == 0:
            rows, cols = window.inside(Window.whole(*image.shape[-2:]))
            return image[None, :, None, rows, cols]
        return image.new_zeros(1).expand(1, image.shape[0], 1, *window.shape)

    return pixels


@torch.no_grad()
def encode_tiled(
    vae: Any,
    pixels: PixelSource,
    size: tuple[int, int, int],
    grid: TileGrid,
    *,
    should_stop: Callable[[], None] = lambda: None,
) -> Tensor:
    """The posterior's mode, (1, z, t, h, w): diffusers' ``vae.encode(clip).latent_dist.mode()``.

    Args:
        vae: an `AutoencoderKLWan` of which `encoder` and `quant_conv` hold weights.
        pixels: the clip.
        size: its frames, height and width in pixels.
        grid: rows and columns of tiles.
        should_stop: called between units of work; ends the encoding by raising.

    Raises:
        CheckpointError: the VAE is not a Wan 2.1 VAE.
        RequestError: a size that does not divide into latents.
        UsageError: more tiles than latents along an axis.
    """
    arch = levels_of(vae)
    temporal = 1 << sum(vae.encoder.temperal_downsample)
    _check_size(size, temporal, arch.factor)
    frames, height, width = size[0], size[1] // arch.factor, size[2] // arch.factor
    tiles = encode_tiles(arch, grid, height, width)
    features: list[Tensor] = []
    for tile in tiles:
        clip = (pixels(frame, tile.pixels) for frame in range(frames))
        for index, feature in enumerate(_tile_frames(vae.encoder, clip, tile)):
            if index == len(features):
                features.append(feature.new_empty((*feature.shape[:3], height, width)))
            rows, cols = tile.output.inside(Window.whole(height, width))
            features[index][..., rows, cols] = feature
            del feature
            should_stop()
    return _whole_frames(vae, features, should_stop)


def _check_size(size: tuple[int, int, int], temporal: int, spatial: int) -> None:
    frames, height, width = size
    if frames < 1 or (frames - 1) % temporal or height % spatial or width % spatial:
        raise RequestError(
            "the clip does not divide into latents",
            expected=f"{temporal}n+1 frames and sides that are multiples of {spatial}",
            found=f"{frames} frames of {height}x{width}",
            remedy="Crop or pad the clip first.",
        )


def _tile_frames(encoder: Any, frames: Iterator[Tensor], tile: EncodeTile) -> Iterator[Tensor]:
    """Features of one tile after the last downsampler, (1, c, 1, h, w) for each latent frame."""
    past: Past = {}
    layers = iter(encoder.down_blocks)
    for level, windows in enumerate(tile.levels):
        at = 0
        if level == 0:
            entering = partial(causal_conv, encoder.conv_in, past, windows=windows[:2])
            frames = map(entering, frames)
            at = 1
        for _ in range(encoder.num_res_blocks):
            frames = map(partial(residual, next(layers), past, windows[at : at + 3]), frames)
            at += 2
        downsampler = next(layers)
        frames = map(partial(_halved_size, downsampler, windows[-2], windows[-1]), frames)
        frames = _halved_rate(downsampler, frames)
    return frames


def _halved_size(downsampler: Any, before: Window, after: Window, frame: Tensor) -> Tensor:
    """The stride-2 convolution; beyond the right and lower border of the picture it meets zeros."""
    conv = downsampler.resample[1]
    read = after.scaled(2)
    missing = [
        pad
        for have, need in ((before.cols, read.cols), (before.rows, read.rows))
        for pad in (have.lo - need.lo, need.hi + 1 - have.hi)
    ]
    x = frame[:, :, 0]
    if any(missing):
        x = F.pad(x, missing)
    return F.conv2d(x, conv.weight, conv.bias, stride=2)[:, :, None]


def _halved_rate(downsampler: Any, frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """One frame for each two after the first, where the downsampler works in time too."""
    if downsampler.mode != "downsample3d":
        yield from frames
        return
    conv = downsampler.time_conv
    last = next(frames)
    yield last
    for frame in frames:
        following = next(frames)
        triple = [last, frame, following]
        last = following
        del frame, following
        yield _joined(conv, triple)


def _joined(conv: Any, triple: list[Tensor]) -> Tensor:
    """One frame of three; the list is emptied."""
    stacked = torch.cat(triple, dim=2)
    triple.clear()
    return one_frame(conv, stacked)


def _whole_frames(vae: Any, features: list[Tensor], should_stop: Callable[[], None]) -> Tensor:
    """The rest of the encoder on whole latent frames; ``features`` is emptied on the way."""
    past: Past = {}
    window = Window.whole(*features[0].shape[-2:])
    encoder, last = vae.encoder, vae.encoder.down_blocks[-vae.encoder.num_res_blocks :]
    frames = residuals(last, past, window, _emptied(features))
    frames = middle(encoder.mid_block, past, window, frames)
    frames = map(partial(head, encoder, past, (window, window)), frames)
    modes = []
    for frame in map(partial(pointwise, vae.quant_conv), frames):
        modes.append(frame.chunk(2, dim=1)[0].clone())
        del frame
        should_stop()
    return torch.cat(modes, dim=2)


def _emptied(features: list[Tensor]) -> Iterator[Tensor]:
    while features:
        yield features.pop(0)
