"""The transformer over its packed sequence, for inference: attention and feed-forward by chunks,
in place.

Free functions over the block modules beside this file (or diffusers' own). With one chunk they
compute what diffusers' ``MiniMaxH3Transformer3DModel`` does, bit for bit. Keys and values of all
rows come first; then each chunk goes to its end. What is modulated alike lies in one run of rows,
so that nothing is gathered. The comments say what is alive; the closed form is in
`penstock.engine.families.minimax_h3.cost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.attention.kernels import Attention, attention
from penstock.engine.families.minimax_h3.layout import Layout
from penstock.engine.families.minimax_h3.tables import StepTables

Piece = tuple[slice, int]
"""Rows of a chunk, and their row in a table."""


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of every row, (n, turned channels), in the compute dtype; those of both
    elements of a pair."""

    cos: Tensor
    sin: Tensor


@torch.no_grad()
def angles(model: Any, positions: Tensor, device: torch.device, dtype: torch.dtype) -> Angles:
    """Return the rotary tables of a sequence.

    Args:
        model: ``rope.inv_freq`` holds the frequencies.
        positions: (n, 3), fp64.
        device, dtype: of the tables.
    """
    places = positions.to(torch.float32).unsqueeze(-1)
    turns = places * model.rope.inv_freq.to(places.device).view(1, 1, -1)  # (n, 3, frequencies)
    flat = turns.flatten(1)
    both = torch.cat((flat, flat), dim=-1)
    return Angles(both.cos().to(device, dtype), both.sin().to(device, dtype))


def chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    """Yield all rows, at most so many at a time."""
    for start in range(0, rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, rows))


class PackedKV:
    """Room for one block's keys and values of all rows, reused by all blocks.

    Args:
        rows: of the sequence.
        heads: of the model.
        width: of a head.
        like: gives dtype and device.
    """

    def __init__(self, rows: int, heads: int, width: int, like: Tensor) -> None:
        self.k = like.new_empty(1, rows, heads, width)
        self.v = torch.empty_like(self.k)


def refine(model: Any, states: Tensor) -> Tensor:
    """Return the text's rows, which are the same at every step: (1, n, text_dim) to (1, n, d).

    Args:
        model: ``context_embedder`` and ``token_refiner`` bound.
        states: in the compute dtype.
    """
    hidden: Tensor = model.context_embedder(states)
    for block in model.token_refiner.refiner_blocks:
        attn, normed = block.attn, block.norm1(hidden)
        heads = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(normed).unflatten(-1, heads))
        k = attn.norm_k(attn.to_k(normed).unflatten(-1, heads))
        v = attn.to_v(normed).unflatten(-1, heads)
        hidden = hidden + attn.to_out[0](attention(q, k, v))
        del q, k, v
        hidden = hidden + _feed_forward(block.ff, block.norm2(hidden))
    return model.token_refiner.final_norm(hidden)  # type: ignore[no-any-return]


@torch.no_grad()
def packed_forward(
    model: Any,
    blocks: Iterable[tuple[int, Any]],
    layout: Layout,
    text: Tensor,
    video: Tensor,
    sound: Tensor,
    tables: StepTables,
    turns: Angles,
    chunk_rows: int,
    attend: Attention = attention,
) -> tuple[Tensor, Tensor]:
    """Run one forward pass.

    Args:
        model: its projections in and out and the last norm bound.
        blocks: index and module of each block in order, its weights bound while it is the current.
        layout: of the sequence.
        text: (1, n, d), as `refine` gives it.
        video: rows of given pictures and of the video, (n, c), fp32.
        sound: rows of the sound, (n, c), fp32.
        tables: of the step.
        turns: of the sequence.
        chunk_rows: rows that go through a block together.
        attend: the attention.

    Returns:
        What is predicted of the video's rows, without the given ones, and of the sound's, fp32.
    """
    hidden = embedded(model, layout, text, video, sound, chunk_rows)
    pieces = [_pieces(layout, tables, part) for part in chunks(layout.rows, chunk_rows)]
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    kv = PackedKV(layout.rows, heads, width, hidden)
    for index, block in blocks:
        table = tables.block(index)
        packed_block(block, hidden, table, pieces, turns, kv, chunk_rows, attend)
        del table
    del kv
    return predicted(model, layout, hidden, tables, chunk_rows)


def embedded(
    model: Any, layout: Layout, text: Tensor, video: Tensor, sound: Tensor, chunk_rows: int
) -> Tensor:
    """Return the hidden states before the first block: (1, n, d)."""
    hidden = text.new_empty(1, layout.rows, text.shape[-1])
    hidden[:, layout.text] = text
    hidden[0, layout.sound] = model.audio_proj_in(sound).to(hidden.dtype)
    given = layout.given.stop - layout.given.start
    for part in chunks(len(video), chunk_rows):
        rows = model.proj_in(video[part])  # fp32
        before = max(0, min(part.stop, given) - part.start)  # of given pictures
        start = layout.given.start + part.start
        hidden[0, start : start + before] = rows[:before]
        start = layout.video.start + part.start + before - given
        hidden[0, start : start + len(rows) - before] = rows[before:]
        del rows
    return hidden


def _pieces(layout: Layout, tables: StepTables, part: slice) -> list[Piece]:
    """Return the runs of a chunk, in its own rows, and their rows in the tables of blocks."""
    found = []
    for run in layout.runs:
        start, stop = max(run.start, part.start), min(run.stop, part.stop)
        if start < stop:
            rows = slice(start - part.start, stop - part.start)
            found.append((rows, tables.row(run.time, run.tag)))
    return found


def packed_block(
    block: Any,
    hidden: Tensor,
    table: Tensor,
    pieces: list[list[Piece]],
    turns: Angles,
    kv: PackedKV,
    chunk_rows: int,
    attend: Attention = attention,
) -> None:
    """Run one block, in place on ``hidden``.

    Args:
        block: its weights bound; those of its AdaLN projection need not be.
        hidden: (1, n, d).
        table: (6, rows, d): shift, scale and gate of the attention, then of the feed-forward; each
            scale plus one.
        pieces: of each chunk.
        turns: rotary tables.
        kv: room to work in; its content is lost.
        chunk_rows: rows of a chunk.
        attend: the attention.
    """
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table
    attn, heads = block.attn, (block.attn.heads, -1)
    parts = list(zip(chunks(hidden.shape[1], chunk_rows), pieces, strict=True))
    for part, runs in parts:
        x = _modulated(block.norm1(hidden[:, part]), runs, scale, shift)
        kv.v[:, part] = attn.to_v(x).unflatten(-1, heads)
        k = attn.to_k(x).unflatten(-1, heads)
        del x
        k = attn.norm_k(k)
        _turn(k, turns, part, out=kv.k[:, part])
        del k
    for part, runs in parts:
        chunk = hidden[:, part]
        q = attn.to_q(_modulated(block.norm1(chunk), runs, scale, shift))
        q = attn.norm_q(q.unflatten(-1, heads))
        q = _turn(q, turns, part, out=torch.empty_like(q))
        q = attend(q, kv.k, kv.v)
        chunk.add_(_gated(attn.to_out[0](q), runs, gate))
        del q
        x = _modulated(block.norm2(chunk), runs, ffn_scale, ffn_shift)
        chunk.add_(_gated(_feed_forward(block.ff, x), runs, ffn_gate))
        del x


def _modulated(normed: Tensor, runs: list[Piece], scale: Tensor, shift: Tensor) -> Tensor:
    for rows, row in runs:
        normed[:, rows].mul_(scale[row]).add_(shift[row])
    return normed


def _gated(update: Tensor, runs: list[Piece], gate: Tensor) -> Tensor:
    for rows, row in runs:
        update[:, rows].mul_(gate[row])
    return update


def _turn(x: Tensor, turns: Angles, part: slice, out: Tensor) -> Tensor:
    """Turn the leading channels of (1, c, heads, width), halves against each other."""
    cos, sin = turns.cos[part, None], turns.sin[part, None]  # (c, 1, turned)
    turned = cos.shape[-1]
    half = turned // 2
    x1, x2 = x[..., :half], x[..., half:turned]
    out[..., :half] = (x1 * cos[..., :half]).sub_(x2 * sin[..., :half])
    out[..., half:turned] = (x2 * cos[..., half:]).add_(x1 * sin[..., half:])
    out[..., turned:] = x[..., turned:]
    return out


def _feed_forward(ff: Any, x: Tensor) -> Tensor:
    """Map (1, c, d) to the same; ``x`` is the caller's."""
    gated, _, down = ff.net
    value, gate = gated.proj(x).chunk(2, dim=-1)
    if getattr(gated, "gate_first", False):
        value, gate = gate, value
    inner = F.silu(gate).mul_(value)
    del value, gate
    return down(inner)  # type: ignore[no-any-return]


def predicted(
    model: Any, layout: Layout, hidden: Tensor, tables: StepTables, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Apply the last norm and both heads to every row, of which the wanted ones are kept."""
    shift, scale = tables.out
    video = sound = None
    for part in chunks(layout.rows, chunk_rows):
        x = model.norm_out.norm(hidden[:, part]).to(scale.dtype)
        runs = [(rows, tables.time(time)) for rows, time in _times(layout, part)]
        x = _modulated(x, runs, scale, shift).to(torch.float32)
        moving, heard = model.proj_out(x)[0], model.audio_proj_out(x)[0]
        del x
        if video is None or sound is None:
            video = moving.new_empty(layout.latents.video_rows, moving.shape[-1])
            sound = heard.new_empty(layout.latents.sound_rows, heard.shape[-1])
        _keep(moving, part, layout.video, video)
        _keep(heard, part, layout.sound, sound)
    assert video is not None
    assert sound is not None
    return video, sound


def _times(layout: Layout, part: slice) -> Iterator[tuple[slice, str]]:
    for run in layout.runs:
        start, stop = max(run.start, part.start), min(run.stop, part.stop)
        if start < stop:
            yield slice(start - part.start, stop - part.start), run.time


def _keep(made: Tensor, part: slice, wanted: slice, into: Tensor) -> None:
    start, stop = max(part.start, wanted.start), min(part.stop, wanted.stop)
    if start < stop:
        into[start - wanted.start : stop - wanted.start] = made[
            start - part.start : stop - part.start
        ]
