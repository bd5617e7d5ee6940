"""Which weights are quantised.

Only the matrices of the transformer blocks' attention and feed-forward layers: they are 98 % of the
parameters. Patch, text, time and image embeddings, modulation tables, norms, biases and the output
head stay as they are: few bytes, and errors there reach every token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from penstock.quant.format import QuantFormat
from penstock.quant.rows import Shape

_BLOCK_WEIGHT = re.compile(r"blocks\.(\d+)\.(?:attn1|attn2|ffn)\.(.+\.)?weight")


def default_policy(
    shapes: Mapping[str, Sequence[int]], *, keep_blocks: Collection[int] = ()
) -> tuple[str, ...]:
    """Names of the weights to quantise, in the order given.

    Args:
        shapes: shape of each tensor of the transformer, by diffusers' names.
        keep_blocks: blocks that stay plain; some authors keep 0, 1 and the last three.
    """
    chosen = []
    for name, shape in shapes.items():
        match = _BLOCK_WEIGHT.fullmatch(name)
        if match and len(shape) == 2 and int(match[1]) not in keep_blocks:
            chosen.append(name)
    return tuple(chosen)


def assign(
    shapes: Mapping[str, Sequence[int]],
    wanted: QuantFormat,
    plain: QuantFormat,
    *,
    keep_blocks: Collection[int] = (),
) -> dict[str, QuantFormat]:
    """Format of each weight that `default_policy` chooses: ``wanted``, or ``plain`` where the shape
    is not whole blocks (NF4 and GGUF need rows of whole blocks)."""
    return {
        name: wanted if wanted.fits(_matrix(shapes[name])) else plain
        for name in default_policy(shapes, keep_blocks=keep_blocks)
    }


def _matrix(shape: Sequence[int]) -> Shape:
    rows, columns = shape
    return rows, columns
