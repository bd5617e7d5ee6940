"""What sparse attention by comfy-kitchen holds, in bytes."""

from __future__ import annotations

from penstock.units import align_up

BLOCK = 64
"""Tokens that are kept or left out together."""

WIDTH = 128
"""Of a head, the only one that its kernels take."""

_FP32, _HALF, _INDEX = 4, 2, 2


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
