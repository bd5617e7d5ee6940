"""What self-attention by comfy-kitchen holds, in bytes, beside queries, keys, values and result."""

from __future__ import annotations

from penstock.profiles.attending import INT8, SOL
from penstock.units import align_up

BLOCK = 64
"""Tokens that sparse attention keeps or leaves out together."""

WIDTH = 128
"""Of a head, the only one that the kernels of sparse attention take."""

_FP32, _HALF, _INDEX = 4, 2, 2


def attending_items(
    kind: str, heads: int, width: int, queries: int, keys: int, itemsize: int
) -> dict[str, int]:
    """Return all that is alive while queries attend: themselves, the result, and what the kernel
    holds, but not keys and values. Empty for torch's own, whose bytes each model states.

    Args:
        kind: of `penstock.profiles.attending.BACKENDS`.
        width: of a head.
        queries, keys: tokens.
        itemsize: of the compute dtype.
    """
    own = queries * heads * width * itemsize
    if kind == INT8:
        # The result is as wide as the kernel's heads; in fp32 it comes from one of 16 bits beside
        # it. Its copy token by token, when the rest is gone, takes less.
        made = itemsize + (_HALF if itemsize == _FP32 else 0)
        result = queries * heads * _kernel_width(width) * made
        held = int8_attention_bytes(heads, width, queries, keys, itemsize)
        return {"chunk": own + result, "int8_attention": held}
    if kind == SOL:
        return {"chunk": 2 * own, "sol_attention": sol_attention_bytes(heads, keys)}
    return {}


def int8_attention_bytes(heads: int, width: int, queries: int, keys: int, itemsize: int) -> int:
    """Return what comfy-kitchen's int8 attention holds beside queries, keys, values and its result.

    As `_int8_attention_cuda` of comfy-kitchen 0.2.40 (`comfy_kitchen/sage_attention.py`) allocates:
    a head is as wide as 64, 128 or 256, and copied where it is narrower than that; queries and keys
    at a byte an element, values too, their tokens filled up to tiles; fp32 scales, of queries for
    each 128 tokens 32 (64 in the widest heads), of keys 4 a tile, of values one a channel; one
    int32 a head.

    Args:
        width: of a head, up to 256.
        queries, keys: tokens.
        itemsize: of the compute dtype.
    """
    wide = _kernel_width(width)
    tile = 128 if wide >= 128 and keys > 1024 else 64
    tiles = -(-keys // tile)
    codes = wide * (queries + keys + tiles * tile)
    scales = -(-queries // 128) * (64 if wide == 256 else 32) + 4 * tiles + wide
    copies = 0 if wide == width else wide * (queries + 2 * keys) * itemsize
    return heads * (codes + _FP32 * (scales + 1) + copies)


def _kernel_width(width: int) -> int:
    """Return the width of a head in comfy-kitchen's int8 attention."""
    return next(size for size in (64, 128, 256) if width <= size or size == 256)


def sol_attention_bytes(heads: int, tokens: int) -> int:
    """Return what it holds beside queries, keys, values and its result.

    As ``sol_attn_plan`` of comfy-kitchen 0.2.40's CUDA backend lays its workspace out, each part
    from a multiple of 16 on: queries, keys and values at a byte an element with their scales, those
    of keys twice; means of blocks likewise, in rows that are filled up to 64; of each pair of
    blocks a number, and how many there are; a mean query and partial sums in fp32, whose last part
    is scratch.

    Args:
        tokens: queries, and keys as many.
    """
    blocks = -(-tokens // BLOCK)
    padded, rows = blocks * BLOCK, align_up(blocks, BLOCK)
    means = rows * WIDTH
    parts = (
        tokens * WIDTH, tokens * _FP32,  # queries
        padded * WIDTH, 2 * padded * _FP32,  # keys
        padded * WIDTH, WIDTH * _FP32,  # values, a scale a channel
        means, rows * _FP32, means * _HALF,  # keys and values of whole blocks
        blocks * _FP32, blocks * blocks * _INDEX, blocks * _FP32,  # thresholds, indices, counts
        blocks * WIDTH, blocks * _FP32,  # queries of whole blocks
        blocks * WIDTH * _HALF, blocks * _FP32, blocks * _FP32,  # a partial result and its sums
        WIDTH * _FP32, means * _FP32, (means + 2 * WIDTH) * _FP32,
    )  # fmt: skip
    return sum(align_up(heads * part, 16) for part in parts)
