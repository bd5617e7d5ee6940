"""Exact tiled encoding with diffusers' `AutoencoderKLWan`: pixels become latents, without seams.

The way down to the last downsampler runs tile by tile, and within a tile frame by frame; its
features, of latent size, are assembled. What attends across the frame (the mid block), and the
residual blocks before it, then run on whole latent frames. The pixels are asked for crop by crop:
the clip never exists as a whole.

Where frames are known to be equal in a row, as in the clip that carries a first frame, each layer
stops computing as soon as all that it sees is the same (`penstock.engine.families.wan.vae_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan import vae_residual
from penstock.engine.families.wan.cost.runs import clip_runs
from penstock.engine.families.wan.vae_layers import (
    RESIDUAL_REACH,
    Past,
    Run,
    each_time,
    entered,
    halved_size,
    head,
    levels_of,
    middle,
    once,
    one_frame,
    pointwise,
    residual,
    residuals,
    through,
)
from penstock.errors import RequestError
from penstock.profiles.tiling import EncodeTile, TileGrid, Window, encode_tiles

PixelSource = Callable[[int, Window], Tensor]
"""Gives the pixels (1, 3, 1, h, w) in [-1, 1] of a frame's window, on the device, in the dtype."""


def first_frame_then_zeros(image: Tensor, last: tuple[int, Tensor] | None = None) -> PixelSource:
    """Return the conditioning clip of Wan's image-to-video: the picture, frames of zeros, and where
    it is given the last picture.

    Args:
        image: (3, height, width) in [-1, 1], where the VAE is and of its dtype.
        last: index of the last frame, and the picture that it is; None: it is zeros too.
    """
    given = {0: image} if last is None else {0: image, last[0]: last[1]}

    def pixels(frame: int, window: Window) -> Tensor:
        if frame in given:
            rows, cols = window.inside(Window.whole(*image.shape[-2:]))
            return given[frame][None, :, None, rows, cols]
        return image.new_zeros(1).expand(1, image.shape[0], 1, *window.shape)

    return pixels


@torch.no_grad()
def encode_tiled(
    vae: Any,
    pixels: PixelSource,
    size: tuple[int, int, int],
    grid: TileGrid,
    *,
    changes: Sequence[int] | None = None,
    should_stop: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the posterior's mode, (1, z, t, h, w): diffusers'
    ``vae.encode(clip).latent_dist.mode()``.

    Args:
        vae: an `AutoencoderKLWan` of which `encoder` and `quant_conv` hold weights.
        pixels: the clip.
        size: its frames, height and width in pixels.
        grid: rows and columns of tiles.
        changes: frames that may differ from the one before, as `clip_runs` takes them. The result
            is the same to the bit as without.
        should_stop: called for each latent frame of each tile, and of the whole; ends the encoding
            by raising.

    Raises:
        CheckpointError: the VAE is not a Wan 2.1 VAE.
        RequestError: a size that does not divide into latents.
        UsageError: more tiles than latents along an axis.
    """
    arch, by_shortcuts = levels_of(vae), bool(vae.config["is_residual"])
    temporal = 1 << sum(vae.encoder.temperal_downsample)
    _check_size(size, temporal, arch.factor, one=by_shortcuts)
    runs = clip_runs(size[0], changes)
    height, width = size[1] // arch.factor, size[2] // arch.factor
    features: list[Run] = []
    for tile in encode_tiles(arch, grid, height, width):
        window = tile.pixels.scaled(arch.patch)
        clip = ((pixels(first, window), times) for first, times in runs)
        rows, cols = tile.output.inside(Window.whole(height, width))
        index = 0  # `enumerate` would hold on to a feature while the next is made
        for feature, times in _tile_frames(vae.encoder, clip, tile, arch.patch):
            if index == len(features):
                features.append((feature.new_empty((*feature.shape[:3], height, width)), times))
            features[index][0][..., rows, cols] = feature
            index += 1  # noqa: SIM113
            del feature
            for _ in range(times):
                should_stop()
    return _whole_frames(vae, features, should_stop)


def normalised_latents(encoded: Tensor, config: Any) -> Tensor:
    """Return (1, z, t, h, w) as the transformer sees them, rounded as diffusers' pipelines do."""
    view = (1, config.z_dim, 1, 1, 1)
    mean = torch.tensor(config.latents_mean).view(view).to(encoded)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(view).to(encoded)
    return (encoded - mean) * inverse_std


def _check_size(size: tuple[int, int, int], temporal: int, spatial: int, *, one: bool) -> None:
    frames, height, width = size
    if one and frames != 1:
        raise RequestError(
            "this VAE encodes a picture", expected="1 frame", found=f"{frames} frames"
        )
    if frames < 1 or (frames - 1) % temporal or height % spatial or width % spatial:
        raise RequestError(
            "the clip does not divide into latents",
            expected=f"{temporal}n+1 frames and sides that are multiples of {spatial}",
            found=f"{frames} frames of {height}x{width}",
            remedy="Crop or pad the clip first.",
        )


def _tile_frames(
    encoder: Any, runs: Iterator[Run], tile: EncodeTile, patch: int = 1
) -> Iterator[Run]:
    """Return the features of one tile after the last downsampler, (1, c, 1, h, w) for each latent
    frame."""
    if hasattr(encoder.down_blocks[0], "avg_shortcut"):
        return vae_residual.encoded_tile(encoder, _only(runs, patch), tile)
    past = Past()
    layers = iter(encoder.down_blocks)
    for level, windows in enumerate(tile.levels):
        at = 0
        if level == 0:
            runs = entered(encoder.conv_in, past, windows[:2], runs)
            at = 1
        for _ in range(encoder.num_res_blocks):
            block = partial(residual, next(layers), past, windows[at : at + 3])
            runs = through(block, runs, RESIDUAL_REACH)
            at += 2
        downsampler = next(layers)
        halve = partial(halved_size, downsampler, past, windows[-2], windows[-1])
        runs = through(each_time(halve), runs)
        if downsampler.mode == "downsample3d":
            runs = _HalvedRate(downsampler.time_conv, past, runs)
    return runs


def _only(runs: Iterator[Run], patch: int) -> Tensor:
    """Return the one frame of a clip, as it is convolved."""
    ((frame, _),) = runs
    return frame if patch == 1 else vae_residual.patched(frame, patch)


class _HalvedRate(Iterator[Run]):
    """One frame for each two after the first: of these and of the one before them."""

    def __init__(self, conv: Any, past: Past, runs: Iterator[Run]) -> None:
        self._conv, self._past, self._runs = conv, past, runs
        self._last: Tensor | None = None
        self._frame: Tensor
        self._left = 0

    def __next__(self) -> Run:
        if self._last is None:
            self._last = self._taken()
            return once(self._last)
        seen = [self._last, self._taken(), self._taken()]
        times = 1
        if all(frame is self._frame for frame in seen):
            times += self._left // 2
            self._left %= 2
        self._last = self._frame
        return self._joined(seen), times

    def _taken(self) -> Tensor:
        """Return the next frame; those of a run are one object."""
        if not self._left:
            self._frame, self._left = next(self._runs)
        self._left -= 1
        return self._frame

    def _joined(self, seen: list[Tensor]) -> Tensor:
        """Return one frame of three; the list is emptied."""
        _, channels, _, height, width = self._frame.shape
        room = self._past.room(self._frame, (1, channels, len(seen), height, width))
        torch.cat(seen, dim=2, out=room)
        seen.clear()
        return one_frame(self._conv, room)


def _whole_frames(vae: Any, features: list[Run], should_stop: Callable[[], None]) -> Tensor:
    """Return the rest of the encoder on whole latent frames; ``features`` is emptied on the way."""
    past = Past()
    window = Window.whole(*features[0][0].shape[-2:])
    encoder = vae.encoder
    if vae.config["is_residual"]:
        runs = vae_residual.last_block(encoder, past, window, _emptied(features))
    else:
        last = encoder.down_blocks[-encoder.num_res_blocks :]
        runs = residuals(last, past, window, _emptied(features))
    runs = middle(encoder.mid_block, past, window, runs)
    runs = head(encoder, past, (window, window), runs)
    runs = through(each_time(partial(pointwise, vae.quant_conv)), runs)
    modes = []
    for frame, times in runs:
        modes += times * [frame.chunk(2, dim=1)[0].clone()]
        del frame
        for _ in range(times):
            should_stop()
    return torch.cat(modes, dim=2)


def _emptied(features: list[Run]) -> Iterator[Run]:
    while features:
        yield features.pop(0)
