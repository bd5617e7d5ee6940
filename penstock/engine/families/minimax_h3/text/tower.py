"""Qwen3-VL's vision tower: from patches of pictures to what stands in their tokens' places.

Free functions over the modules beside this file, bit-equal to transformers' ``Qwen3VLVisionModel``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

from penstock.engine.families.minimax_h3.text.language import turned


def grid_places(height: int, width: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the row and column of each patch of a picture: patches that become one token lie
    together."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    shape = (height // merge, merge, width // merge, merge)
    found = [axis.reshape(shape).transpose(1, 2).flatten() for axis in (rows, columns)]
    return found[0], found[1]


def embed_patches(tower: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches of a picture with their learned places, (patches, width): the square table
    of places is scaled to the picture's grid."""
    hidden = tower.patch_embed(pixels)
    side = int(tower.config.num_position_embeddings**0.5)
    taps, weights = _taps(grid, side, tower.config.spatial_merge_size)
    table, device = tower.pos_embed.weight, hidden.device
    learned = table[taps.to(device)] * weights.to(device)[:, :, None]
    return hidden + learned.sum(1).to(hidden.dtype)  # type: ignore[no-any-return]


def _taps(grid: tuple[int, int], side: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the four entries of the table that each patch lies between, and their weights."""
    found = []
    for places, size in zip(grid_places(*grid, merge), grid, strict=True):
        source = places.float() * (side - 1) / max(size - 1, 1)
        low = torch.floor(source)
        offsets = torch.arange(2)
        taps = (low.long()[:, None] + offsets).clamp(0, side - 1)
        far = (source[:, None] - low[:, None] - offsets).abs()
        found.append((taps, (1 - far).clamp(min=0)))
    (rows, above), (columns, left) = found
    taps = (rows[:, :, None] * side + columns[:, None]).reshape(-1, 4)
    return taps, (above[:, :, None] * left[:, None]).reshape(-1, 4)


def tower_rope(
    grid: tuple[int, int], config: Any, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (patches, 1, head width) fp32: half of the angles turn with the
    row, half with the column."""
    head = config["hidden_size"] // config["num_heads"]
    steps = torch.arange(0, head // 2, 2, dtype=torch.float32) / (head // 2)
    frequencies = (1.0 / config["rope_theta"] ** steps).to(device)
    places = torch.stack(grid_places(*grid, config["spatial_merge_size"]), dim=-1).to(device)
    angles = (places[..., None].float() * frequencies).flatten(1)
    waves = [torch.cat([w, w], dim=-1)[:, None] for w in (angles.cos(), angles.sin())]
    return waves[0], waves[1]


def see(
    tower: Any,
    blocks: Iterable[tuple[int, Module]],
    pictures: Sequence[tuple[Tensor, tuple[int, int]]],
) -> tuple[Tensor, list[Tensor]]:
    """Run the vision tower over all pictures, all in one visit to each layer.

    Args:
        tower: ``Qwen3VLVisionModel``, the weights outside its layers bound.
        blocks: ``(index, Qwen3VLVisionBlock)`` in order.
        pictures: patches (n, values) and their grid, each.

    Returns:
        What stands in the place of the pictures' tokens (tokens, d), and what is added to them
        after the first layers of the language model.
    """
    hidden = [embed_patches(tower, pixels, grid) for pixels, grid in pictures]
    waves = [tower_rope(grid, tower.config, hidden[0].device) for _, grid in pictures]
    after = list(tower.config.deepstack_visual_indexes)
    features: dict[int, Tensor] = {}
    for index, block in blocks:
        for at, wave in enumerate(waves):
            _run_block(block, hidden[at], wave)
        if index in after:
            merger = tower.deepstack_merger_list[after.index(index)]
            features[index] = torch.cat([merger(each) for each in hidden])
    merged = torch.cat([tower.merger(each) for each in hidden])
    return merged, [features[index] for index in after]


def _run_block(block: Any, hidden: Tensor, waves: tuple[Tensor, Tensor]) -> None:
    hidden += _look(block.attn, block.norm1(hidden), waves)
    hidden += block.mlp(block.norm2(hidden))


def _look(module: Any, normed: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    # (n, 3 * heads * d) -> three of (n, heads, d)
    query, key, value = module.qkv(normed).unflatten(1, (3, module.num_heads, -1)).unbind(1)
    query, key = _turned_wide(query, waves), _turned_wide(key, waves)
    scale = query.shape[-1] ** -0.5
    # (n, heads, d) -> (1, heads, n, d)
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    mixed = scaled_dot_product_attention(query, key, value, scale=scale)
    return module.proj(mixed[0].transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


def _turned_wide(states: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    return turned(states.float(), waves).to(states.dtype)
