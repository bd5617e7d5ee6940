"""The VAE of Wan2.2 TI2V: blocks with a shortcut around all that they do, their resampling too.

Its layers are those of Wan2.1's VAE (`penstock.engine.families.wan.vae_layers`), and so are its
tiles: a shortcut repeats or averages pixels of the block's own input, which every tile has with its
halo. The picture that is convolved has half the video's sides and four times its channels.

As diffusers' `AutoencoderKLWan` with ``is_residual``. What is encoded is one frame, the only clip
that its pipeline encodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.families.wan.vae_layers import (
    Past,
    Run,
    causal_conv,
    doubled_size,
    halved_size,
    head,
    joined_in_time,
    once,
    one_frame,
    residual,
)
from penstock.profiles.tiling import DecodeTile, EncodeTile, Window

Pair = tuple[Tensor, Tensor]
"""What a block was given, and what its residual blocks made of it."""


def patched(pixels: Tensor, patch: int) -> Tensor:
    """Map (1, 3, 1, h, w) -> (1, 3 * patch^2, 1, h / patch, w / patch); of a channel the columns of
    a patch come before its rows, as diffusers' ``patchify`` lays them."""
    return F.pixel_unshuffle(pixels[:, :, 0].mT, patch).mT[:, :, None]


def unpatched(frame: Tensor, patch: int) -> Tensor:
    """Return what `patched` takes apart, together again."""
    return F.pixel_shuffle(frame[:, :, 0].mT, patch).mT[:, :, None]


def whole_frames(decoder: Any, past: Past, frames: Iterator[Tensor], window: Window) -> Iterator[
    Tensor
]:  # fmt: skip
    """Yield what the first up block is given and what its residual blocks make of it, (1, 2c, 1, h,
    w) for each latent frame."""
    for frame in frames:
        made = frame
        for each in decoder.up_blocks[0].resnets:
            made = residual(each, past, (window,) * 3, made)
        parts = [torch.cat([frame, made], dim=1)]
        del frame, made
        yield parts.pop()  # what a name still held would wait for the next frame


def tile_frames(
    decoder: Any, features: Sequence[Tensor], tile: DecodeTile, past: Past
) -> Iterator[Tensor]:
    """Return all frames of one tile, (1, channels, 1, h, w) each, before they are unpatched."""
    rows, cols = tile.tail.inside(Window.whole(*features[0].shape[-2:]))
    pairs: Iterator[Pair] = (
        (pair[0], pair[1]) for pair in (f[..., rows, cols].chunk(2, dim=1) for f in features)
    )
    low = tile.tail
    for lower, upper, windows in zip(
        decoder.up_blocks, decoder.up_blocks[1:], tile.levels, strict=False
    ):
        frames = _enlarged(lower, past, low, windows[0], pairs)
        pairs = _resolved(upper, past, windows, frames)
        low = windows[2 * len(upper.resnets)]
    return map(itemgetter(0), head(decoder, past, tile.levels[-1][-2:], _results(pairs)))


def _results(pairs: Iterator[Pair]) -> Iterator[Run]:
    for given, made in pairs:
        run = [once(made)]
        del given, made
        yield run.pop()


def _resolved(
    block: Any, past: Past, windows: Sequence[Window], frames: Iterator[Tensor]
) -> Iterator[Pair]:
    """Yield the residual blocks of an up block on a tile; of what they were given the part that its
    shortcut sees."""
    rows, cols = windows[2 * len(block.resnets)].inside(windows[0])
    for frame in frames:
        made = frame
        for index, each in enumerate(block.resnets):
            made = residual(each, past, windows[2 * index : 2 * index + 3], made)
        pair = [(frame[..., rows, cols], made)]
        del frame, made
        yield pair.pop()


def _enlarged(
    block: Any, past: Past, low: Window, after: Window, pairs: Iterator[Pair]
) -> Iterator[Tensor]:
    """Yield an up block's enlargement on a tile, and its shortcut. Where it works in time as well,
    the first frame passes by, and is the second of the two that its shortcut makes."""
    upsampler, shortcut = block.upsampler, block.avg_shortcut
    seen: list[Tensor] = []
    is_first = True  # `enumerate` would hold on to a pair while the next is made
    for given, made in pairs:
        skipped = 0
        if upsampler.mode != "upsample3d":
            halves = [made]
        elif is_first:
            halves, skipped = [made], shortcut.factor_t - 1
        else:
            seen.append(made)
            room = joined_in_time(past, seen)
            halves = list(one_frame(upsampler.time_conv, room).chunk(2, dim=1))
        del made
        for at in range(skipped, skipped + len(halves)):
            large = doubled_size(upsampler, past, low, after, halves.pop(0))
            yield _with_shortcut(large, shortcut, at, given, low, after)
            del large
        del given
        is_first = False


def _with_shortcut(
    large: Tensor, shortcut: Any, at: int, given: Tensor, low: Window, after: Window
) -> Tensor:
    """Return ``large`` and, added to it in place, each pixel of ``given`` four times: a `DupUp3D`.

    Args:
        large: (1, c, 1, h, w) of the window ``after``.
        at: which of the frames that ``given`` becomes.
        given: of the window ``low``, in a picture of half the size.
    """
    channels = torch.arange(shortcut.out_channels, device=large.device) * shortcut.factor
    (top, left), (first_row, first_col) = (
        (window.rows.lo, window.cols.lo) for window in (after, low)
    )
    for row in (0, 1):
        for col in (0, 1):
            part = large[..., (row - top) % 2 :: 2, (col - left) % 2 :: 2]
            down = (top + (row - top) % 2) // 2 - first_row
            right = (left + (col - left) % 2) // 2 - first_col
            seen = given[..., down : down + part.shape[-2], right : right + part.shape[-1]]
            of = (channels + 4 * at + 2 * row + col) // shortcut.repeats
            part.add_(seen.index_select(1, of))
    return large


def encoded_tile(encoder: Any, pixels: Tensor, tile: EncodeTile) -> Iterator[Run]:
    """Yield the feature of one tile of the only frame, after the last downsampler, (1, c, 1, h, w).

    Args:
        pixels: as `patched` gives them.
    """
    past = Past()
    frame = causal_conv(encoder.conv_in, past, pixels, tile.levels[0][:2])
    del pixels
    for level, (block, windows) in enumerate(zip(encoder.down_blocks, tile.levels, strict=False)):
        at, made = 1 if level == 0 else 0, frame
        rows, cols = windows[-1].scaled(2).inside(windows[at])
        for each in block.resnets:
            made = residual(each, past, windows[at : at + 3], made)
            at += 2
        made = halved_size(block.downsampler, past, windows[-2], windows[-1], made)
        frame = made.add_(block.avg_shortcut(frame[..., rows, cols]))
        del made
    yield once(frame)


def last_block(encoder: Any, past: Past, window: Window, runs: Iterator[Run]) -> Iterator[Run]:
    """Yield the last down block, which halves nothing, on the whole frame."""
    block = encoder.down_blocks[-1]
    for frame, _ in runs:
        made = frame
        for each in block.resnets:
            made = residual(each, past, (window,) * 3, made)
        made.add_(block.avg_shortcut(frame))
        del frame
        yield once(made)
        del made
