"""Which weights are quantised.

Only the matrices of the transformer blocks' attention and feed-forward layers: they are 98 % of the
parameters. Patch, text, time and image embeddings, modulation tables, norms, biases and the output
head stay as they are: few bytes, and errors there reach every token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_BLOCK_WEIGHT = re.compile(
    r"(?:transformer_)?blocks\.(\d+)\.(?:attn1|attn2|ffn|attn|ff)\.(.+\.)?weight"
)


def default_policy(
    shapes: Mapping[str, Sequence[int]],
) -> tuple[str, ...]:
    """Return the names of the weights to quantise, in the order given.

    Args:
        shapes: shape of each tensor of the transformer, by diffusers' names.
    """
    chosen = []
    for name, shape in shapes.items():
        match = _BLOCK_WEIGHT.fullmatch(name)
        if match and len(shape) == 2:
            chosen.append(name)
    return tuple(chosen)
