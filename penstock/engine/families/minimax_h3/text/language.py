"""Qwen3-VL's language model: what it reads, and its first layers over it.

Free functions over the modules beside this file; what they compute is bit-equal to transformers'
``Qwen3VLModel`` under diffusers' modular pipeline: the prompt verbatim, without chat template or
special tokens; each picture before it as ``<Picture i>: `` and a vision block; the hidden state of
layer 50, before any norm. Nothing but that one state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

TEXT_TAG, VIDEO_TAG = 1, 0
"""What the transformer modulates a row by: rows of a vision block count as video."""


@dataclass(frozen=True)
class Presentation:
    """What the language model reads.

    Attributes:
        ids: token ids.
        pictures: the place of the first token of each picture, and its grid of patches (h, w).
        tags: of each token, for the transformer.
        merge: patches of a token along a side.
    """

    ids: tuple[int, ...]
    pictures: tuple[tuple[int, tuple[int, int]], ...]
    tags: tuple[int, ...]
    merge: int = 2

    def seen(self) -> list[int]:
        """Return the places of the tokens that stand for pictures."""
        return [
            place for start, grid in self.pictures for place in range(start, start + self._of(grid))
        ]

    def _of(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.merge**2


def present(
    prompt: Sequence[int],
    labels: Sequence[Sequence[int]] = (),
    grids: Sequence[tuple[int, int]] = (),
    marks: tuple[int, int, int] = (0, 0, 0),
    merge: int = 2,
) -> Presentation:
    """Lay out pictures and prompt.

    Args:
        prompt: its tokens.
        labels: the tokens that name each picture.
        grids: patches of each picture, height and width.
        marks: tokens that begin a vision block, stand in it, and end it.
        merge: patches of a token along a side.
    """
    ids: list[int] = []
    tags: list[int] = []
    pictures = []
    begin, pad, end = marks
    for label, grid in zip(labels, grids, strict=True):
        count = grid[0] * grid[1] // merge**2
        pictures.append((len(ids) + len(label) + 1, grid))
        ids += [*label, begin, *[pad] * count, end]
        tags += [TEXT_TAG] * len(label) + [VIDEO_TAG] * (count + 2)
    ids += prompt
    tags += [TEXT_TAG] * len(prompt)
    return Presentation(tuple(ids), tuple(pictures), tuple(tags), merge)


def positions(shown: Presentation) -> Tensor:
    """Return the time, height and width of each token, (3, n): text counts on in all three; a
    picture has one time, and takes as many counts as its longer side."""
    parts, done, count = [], 0, 0

    def words(until: int) -> None:
        nonlocal done, count
        parts.append((torch.arange(until - done) + count).expand(3, -1))
        count, done = count + until - done, until

    for start, (height, width) in shown.pictures:
        words(start)
        rows, columns = height // shown.merge, width // shown.merge
        axes = torch.arange(1), torch.arange(rows), torch.arange(columns)
        grid = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        parts.append(grid + count)
        count, done = count + max(rows, columns), start + rows * columns
    words(len(shown.ids))
    return torch.cat(parts, dim=1)


def rope(places: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (1, 1, n, head width) of tokens at ``places`` (3, n): the
    frequencies take turns between time, height and width, as far as each one's section goes."""
    head = config["head_dim"]
    steps = torch.arange(0, head, 2, dtype=torch.float32, device=places.device) / head
    angles = places[..., None].float() * (1.0 / config["rope_theta"] ** steps)  # (3, n, head / 2)
    waves = []
    for each in (angles.cos(), angles.sin()):
        mixed = each[0].clone()
        for axis in (1, 2):
            turns = slice(axis, 3 * config["mrope_section"][axis], 3)
            mixed[:, turns] = each[axis][:, turns]
        waves.append(torch.cat([mixed, mixed], dim=-1)[None, None].to(dtype))
    return waves[0], waves[1]


def embed(
    shown: Presentation,
    read_rows: Callable[[list[int]], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the embedding vectors (1, n, d) of the tokens; each distinct token's row is read once,
    no other."""
    distinct = sorted(set(shown.ids))
    place = {token: index for index, token in enumerate(distinct)}
    rows = read_rows(distinct).to(device=device, dtype=dtype)
    return rows[torch.tensor([place[token] for token in shown.ids], device=device)].unsqueeze(0)


def encode_layers(
    layers: Iterable[tuple[int, Module]],
    hidden: Tensor,
    waves: tuple[Tensor, Tensor],
    seen: Sequence[int] = (),
    features: Sequence[Tensor] = (),
) -> Tensor:
    """Run layers of the language model.

    Args:
        layers: ``(index, Qwen3VLTextDecoderLayer)`` in order, weights bound while the loop holds
            them.
        hidden: (1, n, d); used up: it is added to in place.
        waves: of `rope`.
        seen: places of the pictures' tokens.
        features: what the vision tower adds to those after the first layers, (tokens, d) each.

    Returns:
        (1, n, d): what the last layer gives.
    """
    places = torch.tensor(seen, dtype=torch.long, device=hidden.device)
    for index, layer in layers:
        _run_layer(layer, hidden, waves)
        if index < len(features):
            hidden[0].index_add_(0, places, features[index].to(hidden))
    return hidden


def _run_layer(layer: Any, hidden: Tensor, waves: tuple[Tensor, Tensor]) -> None:
    hidden += _attend(layer.self_attn, layer.input_layernorm(hidden), waves)
    hidden += layer.mlp(layer.post_attention_layernorm(hidden))


def _attend(module: Any, normed: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    # (1, n, heads * d) -> (1, heads, n, d)
    query, key, value = (
        part(normed).unflatten(-1, (-1, module.head_dim))
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    del normed
    query = turned(module.q_norm(query).transpose(1, 2), waves)
    key = turned(module.k_norm(key).transpose(1, 2), waves)
    # Each key and value serves several queries. They are repeated here: of torch's kernels only one
    # does so itself, and where it cannot run the next would store all scores.
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value.transpose(1, 2)))
    mixed = scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=module.head_dim**-0.5
    )
    del query, key, value
    return module.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def turned(states: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``states`` turned by the cosines and sines of their places, halves against each
    other."""
    cosines, sines = waves
    first, second = states.chunk(2, dim=-1)
    return (states * cosines).add_(torch.cat((-second, first), dim=-1).mul_(sines))
