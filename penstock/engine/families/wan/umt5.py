"""The prompt's way to the transformer: cleaned, embedded, run through UMT5 by layers.

Free functions over the block modules of transformers' ``UMT5EncoderModel``; what they compute is
bit-equal to that model under diffusers' Wan pipelines. Each visit to a block serves all prompts,
one after another, so a streamed encoder is read once. Inference only: there is no dropout.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention

from penstock.engine.files.tokenizer import TokenisedPrompt

_SPACES = re.compile(r"\s+")


def clean_prompt(text: str) -> str:
    """Mend the encoding, resolve HTML entities, leave single spaces: as diffusers' Wan pipelines do
    it."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACES.sub(" ", text.strip()).strip()


def embed(
    prompts: Sequence[TokenisedPrompt],
    read_rows: Callable[[list[int]], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Return the embedding vectors of the prompts; each distinct token's row is read once, no
    other.

    Args:
        prompts: the tokenised prompts.
        read_rows: gives the rows ``(n, d)`` of the embedding table for ascending row numbers.
        dtype: the compute type.
        device: where the vectors go.

    Returns:
        One tensor ``(1, tokens, d)`` a prompt.
    """
    distinct = sorted({token for prompt in prompts for token in prompt.ids})
    place = {token: index for index, token in enumerate(distinct)}
    rows = read_rows(distinct).to(device=device, dtype=dtype)
    return [
        rows[torch.tensor([place[token] for token in prompt.ids], device=device)].unsqueeze(0)
        for prompt in prompts
    ]


def encode_layers(
    blocks: Iterable[tuple[int, Module]], hidden: list[Tensor], lengths: Sequence[int]
) -> list[Tensor]:
    """Run UMT5 encoder blocks over all prompts, all prompts in one visit to each block.

    Args:
        blocks: ``(index, UMT5Block)`` in order, weights bound while the loop holds them.
        hidden: one tensor ``(1, tokens, d)`` a prompt. The list is used up: its entries are
            replaced as the blocks go by, so that no layer's input outlives the layer.
        lengths: tokens of each prompt that are not padding.

    Returns:
        ``hidden``, holding the last block's output.
    """
    tokens = hidden[0].shape[1]
    steps = torch.arange(tokens, device=hidden[0].device)
    # Distance key - query, counted from 0: (tokens, tokens) -> flat, one entry a score
    distances = (steps[None, :] - steps[:, None]).add_(tokens - 1).flatten()
    for _, block in blocks:
        for prompt, length in enumerate(lengths):
            hidden[prompt] = _run_block(block, hidden[prompt], length, distances)
    return hidden


def finish(final_layer_norm: Module, hidden: Tensor, length: int) -> Tensor:
    """Return the encoder's last norm, and zeros in the place of padding: ``(1, tokens, d)``."""
    states: Tensor = final_layer_norm(hidden)
    states[:, length:] = 0
    return states


def _run_block(block: Any, hidden: Tensor, length: int, distances: Tensor) -> Tensor:
    attention, feed_forward = block.layer[0], block.layer[-1]
    hidden = _clamp_half(hidden + _attend(attention, hidden, length, distances))
    return _clamp_half(hidden + _feed_forward(feed_forward, hidden))


def _attend(layer: Any, hidden: Tensor, length: int, distances: Tensor) -> Tensor:
    module = layer.SelfAttention
    normed = layer.layer_norm(hidden)
    # (1, n, heads * d) -> (1, heads, n, d)
    query, key, value = (
        part(normed).unflatten(-1, (module.n_heads, -1)).transpose(1, 2)
        for part in (module.q, module.k, module.v)
    )
    del normed
    bias = _position_bias(module, length, distances).to(query.dtype)
    # T5 does not scale its scores
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    del query, key, value, bias
    return module.o(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _position_bias(module: Any, length: int, distances: Tensor) -> Tensor:
    """Return the learned bias of each score, ``(1, heads, n, n)``, lowest where the key is padding.

    Only ``2n - 1`` distances differ: the module is asked for those, and each score picks its own.
    """
    tokens = int(len(distances) ** 0.5)
    behind = module.compute_bias(tokens, 1)[0, :, :, 0]  # query 0..n-1 to key 0
    ahead = module.compute_bias(1, tokens)[0, :, 0, 1:]  # query 0 to key 1..n-1
    table = torch.cat([behind.flip(-1), ahead], dim=-1)  # (heads, 2n - 1)
    bias = table.index_select(1, distances).view(1, -1, tokens, tokens)
    bias[..., length:] = torch.finfo(bias.dtype).min
    return bias


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    dense = layer.DenseReluDense
    normed = layer.layer_norm(hidden)
    states = dense.act(dense.wi_0(normed)).mul_(dense.wi_1(normed))
    weight = getattr(dense.wo, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        # transformers keeps wo in fp32 where the rest is fp16
        states = states.to(weight.dtype)
    return dense.wo(states)  # type: ignore[no-any-return]


def _clamp_half(hidden: Tensor) -> Tensor:
    """As in transformers' UMT5Block: fp16 overflow becomes (nearly) the largest finite value."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(torch.float16).max
    bound = torch.where(hidden.isinf().any(), largest - 1000, largest)
    return hidden.clamp_(-bound, bound)
