"""Bytes and FLOPs of the text and the image encoder, in closed form.

Bytes are those of live tensors other than weights, at the worst moment of
`penstock.engine.families.wan.umt5` and `penstock.engine.families.wan.clip`: never under what is
measured, and within 5 % of it at the shapes of UMT5-XXL and CLIP ViT-H/14. FLOPs count a
multiply-add as two.
"""

from __future__ import annotations

from penstock.engine.families.wan.spec import ImageSpec, TextSpec

_INDEX = 8  # bytes of an int64
_SINGLE = 4  # bytes of an fp32: norms and attention sums are kept in it
_CHANNELS = 3


def text_bytes(
    spec: TextSpec, tokens: int = 512, prompts: int = 2, itemsize: int | None = None
) -> int:
    """Return the peak bytes of activations while prompts are embedded and encoded.

    Args:
        spec: the encoder.
        tokens: padded length of each prompt.
        prompts: prompts that go through a block in one visit.
        itemsize: bytes of an activation element; the weights' compute type by default.
    """
    item = itemsize or spec.weights.itemsize
    states = tokens * spec.d_model * item
    single = tokens * spec.d_model * _SINGLE
    distances = (tokens * tokens + tokens) * _INDEX
    held = prompts * states + distances
    return max(
        _embedding(states, single, tokens, prompts),
        held + states + _norm(states, single, tokens),
        held + _text_attention(spec, tokens, item),
        held + 2 * states + 4 * tokens * spec.d_ff * item,  # GELU by tanh: four of its width
        (2 * prompts - 1) * states + _norm(states, single, tokens),  # the last norm, by prompt
    )


def _embedding(states: int, single: int, tokens: int, prompts: int) -> int:
    """Return the rows as read (fp32 at worst), the same in the compute type, and the prompts'
    vectors."""
    return prompts * (2 * states + single) + tokens * _INDEX


def _norm(states: int, single: int, tokens: int) -> int:
    """Return the RMS norm: two fp32 copies, what it returns, and the means."""
    return 2 * single + states + 2 * tokens * _SINGLE


def _text_attention(spec: TextSpec, tokens: int, item: int) -> int:
    part = tokens * spec.num_heads * spec.d_kv * item  # q, k, v and the output are one each
    bias = spec.num_heads * tokens * tokens * item
    row = spec.num_heads * tokens
    projection = part + 2 * tokens * spec.d_model * item
    # The bias is looked up in a table of 2n - 1 distances, made of two halves
    lookup = bias + 6 * row * max(item, _SINGLE) + 12 * tokens * _INDEX
    return max(3 * part + bias + part + row * _SINGLE, 3 * part + lookup, projection)


def text_flops(spec: TextSpec, tokens: int = 512, prompts: int = 2) -> int:
    """Return the FLOPs of encoding ``prompts`` prompts of ``tokens`` padded tokens."""
    inner = spec.num_heads * spec.d_kv
    linear = spec.d_model * (4 * inner + 3 * spec.d_ff)
    attention = 2 * tokens * inner
    return 2 * prompts * spec.num_layers * tokens * (linear + attention)


def image_bytes(spec: ImageSpec, itemsize: int | None = None, pictures: int = 1) -> int:
    """Return the peak bytes of activations while pictures are encoded, their fp32 pixel values
    included. In each layer they come one after the other.

    Args:
        spec: the encoder.
        pictures: that are seen.
        itemsize: bytes of an activation element; the weights' compute type by default.
    """
    item = itemsize or spec.weights.itemsize
    values = _CHANNELS * spec.image_size * spec.image_size
    states = spec.tokens * spec.hidden_size * item
    sums = 2 * spec.tokens * _SINGLE * spec.num_attention_heads
    return (
        pictures * values * _SINGLE
        + (pictures - 1) * states
        + max(
            values * item + 4 * states,
            8 * states + sums,
            4 * states + 2 * spec.tokens * spec.intermediate_size * item,
        )
    )


def image_flops(spec: ImageSpec) -> int:
    """Return the FLOPs of encoding one picture: all layers but the last, which is never run."""
    patches = (spec.tokens - 1) * _CHANNELS * spec.patch_size**2 * spec.hidden_size
    linear = spec.hidden_size * (4 * spec.hidden_size + 2 * spec.intermediate_size)
    attention = 2 * spec.tokens * spec.hidden_size
    layers = (spec.num_hidden_layers - 1) * spec.tokens * (linear + attention)
    return 2 * (patches + layers)
