"""The decoder of MiniMax-H3's video VAE over its tiles, and how tiles become frames.

Free functions over the modules beside this file, bit-equal to diffusers' tiled `decode`. A visit to
a block serves all tiles of a group, one after another, so that the weights are read once a group;
each tile is a batch of its own, as the makers have it: a batch of many rounds otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

from penstock.engine.families.minimax_h3.video_vae.config import rope_width
from penstock.engine.families.minimax_h3.video_vae.tiles import Axis, Tile, Tiling

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: what the VAE's pixels are normed by."""


def cut(latents: Tensor, tiling: Tiling, tile: Tile) -> Tensor:
    """Return the latents of a tile, (1, z, t, h, w)."""
    clips, factor = tiling.clips, tiling.factor
    frames = slice(tile.clip * clips.step, tile.clip * clips.step + clips.length)
    top, left = tiling.rows.starts[tile.row] // factor, tiling.columns.starts[tile.column] // factor
    rows = slice(top, top + tiling.rows.length // factor)
    return latents[:, :, frames, rows, left : left + tiling.columns.length // factor]


def rope(tiling: Tiling, config: Any, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (1, n, 1, turned channels) of the tokens of a tile: places run
    from -1 to 1 along each axis, and those that stand for no latent are in the middle."""
    sizes = (
        tiling.clips.length,
        *(axis.length // tiling.factor for axis in (tiling.rows, tiling.columns)),
    )
    axes = [2.0 * (torch.arange(0.5, size, dtype=torch.float32) / size) - 1.0 for size in sizes]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    beside = config["decoder_num_register_tokens"] + 1
    places = torch.cat([grid, grid.new_zeros(beside, 3)]).to(device)
    steps = torch.arange(0, 1, 6 / rope_width(config), dtype=torch.float32)
    frequencies = (1.0 / config["decoder_rope_theta"] ** steps).to(device)
    angles = 2.0 * math.pi * places[None, :, :, None] * frequencies
    angles = angles.flatten(2, 3).tile(2).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def enter(vae: Any, latents: Tensor) -> Tensor:
    """Return a tile's latents (1, z, t, h, w) to the states that the blocks change, (1, n, d)
    fp32."""
    decoder = vae.decoder
    mixed = vae.post_quant_conv(latents.to(vae.post_quant_conv.weight.dtype))
    hidden = decoder.proj_in(mixed.permute(0, 2, 3, 4, 1).flatten(1, 3))
    beside = decoder.register_tokens.to(hidden.dtype)
    return torch.cat([hidden, beside, torch.zeros_like(hidden[:, :1])], dim=1).float()


def through(blocks: Iterable[tuple[int, Module]], hidden: list[Tensor], waves: Any) -> None:
    """Run the decoder's blocks over the states of many tiles, all in one visit to each block.

    Args:
        blocks: ``(index, MiniMaxH3VideoTransformerBlock)`` in order, weights bound while the loop
            holds them.
        hidden: (1, n, d) fp32 of each tile; changed in place.
        waves: of `rope`.
    """
    for _, block in blocks:
        for states in hidden:
            _run_block(block, states, waves)


def _run_block(block: Any, hidden: Tensor, waves: tuple[Tensor, Tensor]) -> None:
    dtype = waves[0].dtype
    hidden += _attend(block.attn, block.norm1(hidden).to(dtype), waves) * block.scale1
    hidden += block.ff(block.norm2(hidden).to(dtype)) * block.scale2


def _attend(module: Any, normed: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    query, key, value = _projected(module, normed)
    del normed
    query, key = _placed(module.norm_q, query, waves), _placed(module.norm_k, key, waves)
    # (1, n, heads, d) -> (1, heads, n, d) and back
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value)
    del query, key, value
    return module.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _projected(module: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if module.fused:  # head by head: query, key, value
        query, key, value = module.to_qkv(normed).unflatten(2, (module.heads, -1)).chunk(3, dim=-1)
        return query, key, value
    query, key, value = (
        part(normed).unflatten(2, (module.heads, -1))
        for part in (module.to_q, module.to_k, module.to_v)
    )
    return query, key, value


def _placed(norm: Module, states: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys normed in fp32, and the first channels of each head turned."""
    cosines, sines = waves
    states = norm(states.float()).to(states.dtype)
    turned = states[..., : cosines.shape[-1]]
    first, second = turned.chunk(2, dim=-1)
    turned.copy_((turned * cosines).add_(torch.cat([-second, first], dim=-1).mul_(sines)))
    return states


def leave(vae: Any, hidden: Tensor, tiling: Tiling) -> Tensor:
    """Map the states of a tile to its pixels, (1, 3, frames, h, w), normed as ImageNet's."""
    decoder, clips = vae.decoder, tiling.clips
    rows, columns = tiling.rows.length // tiling.factor, tiling.columns.length // tiling.factor
    normed = decoder.norm_out(hidden).to(decoder.proj_out.weight.dtype)
    pixels = decoder.proj_out(normed)[:, : clips.length * rows * columns]
    cubes = pixels.view(
        1, clips.length, rows, columns, -1, clips.factor, tiling.factor, tiling.factor
    )
    cubes = cubes.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cubes.reshape(  # type: ignore[no-any-return]
        1, -1, clips.length * clips.factor, rows * tiling.factor, columns * tiling.factor
    )


def blend(one: Tensor, other: Tensor, extent: int, dim: int) -> Tensor:
    """Return ``other`` whose first ``extent`` places along ``dim`` come out of the last of ``one``,
    bit by bit; changed in place."""
    shape = [1] * other.ndim
    shape[dim] = extent
    places = torch.arange(extent, device=other.device, dtype=other.dtype)
    before, after = (1 - places / extent).view(shape), (places / extent).view(shape)
    part = other.narrow(dim, 0, extent)
    part.copy_(one.narrow(dim, one.shape[dim] - extent, extent) * before + part * after)
    return other


class Mosaic:
    """Tiles of a frame, laid one after another, row by row, into the whole.

    A tile is blended with what its neighbours above and to the left were before they were blended
    themselves: of each the last rows and columns are kept until they were needed.

    Args:
        rows, columns: where the tiles lie.
    """

    def __init__(self, rows: Axis, columns: Axis) -> None:
        self._rows, self._columns = rows, columns
        self._above: dict[int, Tensor] = {}
        self._left: Tensor | None = None
        self._whole: Tensor | None = None

    def lay(self, row: int, column: int, pixels: Tensor) -> Tensor | None:
        """Return the next tile, (..., h, w); used up. Gives the whole with the last one."""
        rows, columns = self._rows, self._columns
        if self._whole is None:
            size = rows.size, columns.size
            self._whole = pixels.new_empty((*pixels.shape[:-2], *size))
        below, beside = rows.kept(row), columns.kept(column)
        kept_below, kept_beside = pixels[..., below:, :].clone(), pixels[..., beside:].clone()
        above, left = self._above.pop(column, None), self._left
        if above is not None:
            blend(above, pixels, rows.before(row), -2)
        if column and left is not None:
            blend(left, pixels, columns.before(column), -1)
        del above, left
        self._above[column], self._left = kept_below, kept_beside
        top, start = rows.starts[row], columns.starts[column]
        part = self._whole[..., top : top + below, start : start + beside]
        part.copy_(pixels[..., :below, :beside])
        if (row, column) != (rows.count - 1, columns.count - 1):
            return None
        whole, self._whole = self._whole, None
        self._above, self._left = {}, None
        return whole


class Canvas:
    """Tiles of a video, laid one after another into whole clips, and clips into frames.

    Args:
        tiling: which tiles come.
        video: uint8 (frames, h, w, 3) in RAM, which is filled.
    """

    def __init__(self, tiling: Tiling, video: Tensor) -> None:
        self._tiling, self._video = tiling, video
        self._mosaic = Mosaic(tiling.rows, tiling.columns)
        self._tail: Tensor | None = None

    def lay(self, tile: Tile, pixels: Tensor) -> None:
        """Lay the next tile, (1, 3, frames, h, w) in RAM, in the order of `Tiling.tiles`; it is
        used up."""
        whole = self._mosaic.lay(tile.row, tile.column, pixels)
        if whole is not None:
            self._show(tile.clip, whole)

    def _show(self, clip: int, whole: Tensor) -> None:
        """Blend a whole clip with the one before, and turn it into frames."""
        clips = self._tiling.clips
        half = clips.step * clips.factor
        first = whole[:, :, clips.skipped : half]
        if self._tail is not None:
            blend(self._tail, first, min(clips.tail, clips.first), 2)
        self._tail = whole[:, :, half + clips.skipped :].clone()
        start = clip * clips.first
        write_frames(self._video[start:], first)
        if clip == clips.count - 1:
            write_frames(self._video[start + clips.first :], self._tail)


def write_frames(video: Tensor, frames: Tensor) -> None:
    """Normed pixels (1, 3, t, h, w) to bytes (t, h, w, 3), a frame at a time."""
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (PIXEL_MEAN, PIXEL_STD))
    for at in range(frames.shape[2]):
        unit = frames[0, :, at].to(torch.float32, copy=True)
        unit = unit.mul_(deviation).add_(mean).clamp_(0, 1).mul_(255).round_()
        video[at] = unit.permute(1, 2, 0)


def groups(tiling: Tiling, size: int) -> Iterator[list[Tile]]:
    """Yield all tiles in their order, ``size`` at a time."""
    tiles = list(tiling.tiles())
    for start in range(0, len(tiles), size):
        yield tiles[start : start + size]
