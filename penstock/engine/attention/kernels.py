"""Attention over (batch, tokens, heads, head width) tensors: the one seam for other backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from penstock.profiles.attending import INT8, SDPA, SOL, Attending

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries (1, m, heads, head width), keys and values (1, n, heads, head width) to the result
(1, m, heads * head width), contiguous."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute unmasked softmax attention by torch's own `scaled_dot_product_attention`.

    The heads are moved by a view, as diffusers' native backend does: the flash kernels of CPU and
    CUDA take that layout as it is and return it, so nothing is copied.

    Args:
        q: (1, m, heads, head width).
        k, v: (1, n, heads, head width).

    Returns:
        (1, m, heads * head width), contiguous.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (1, tokens, heads, w) -> (1, heads, ...)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)


def int8_attention() -> Attention:
    """Compute unmasked softmax attention by comfy-kitchen, which quantises queries, keys and values
    to int8 in every call.

    What it holds meanwhile is stated by
    `penstock.profiles.attention_bytes.int8_attention_bytes`.

    Raises:
        ImportError: comfy-kitchen is not installed.
    """
    from comfy_kitchen import int8_attention as kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # views, as above
        found: Tensor = kernel(q, k, v)
        return found.transpose(1, 2).flatten(2, 3)  # head by head -> token by token: a copy

    return attend


def sol_attention(tau: float) -> Attention:
    """Return unmasked attention by comfy-kitchen, exact where blocks of 64 tokens matter to one
    another, and takes the others by their means (arXiv:2607.24027). All queries come at once.

    What it holds meanwhile is stated by
    `penstock.profiles.attention_bytes.sol_attention_bytes`.

    Args:
        tau: how far a block must stand out; above it fewer do.

    Raises:
        ImportError: comfy-kitchen is not installed.
    """
    from comfy_kitchen import sol_attn as kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = kernel(q, k, v, tau=tau)
        return found.flatten(2, 3)

    return attend


_MADE: Mapping[str, Callable[[Attending], Attention]] = MappingProxyType(
    {
        SDPA: lambda asked: attention,
        INT8: lambda asked: int8_attention(),
        SOL: lambda asked: sol_attention(asked.tau),
    }
)


def self_attention_of(word: str) -> Attention:
    """Return the backend that a plan names.

    Raises:
        ImportError: comfy-kitchen is needed, and is not installed.
    """
    asked = Attending.of(word)
    return _MADE[asked.kind](asked)


def self_attention_by_step(word: str, steps: int) -> Callable[[int], Attention]:
    """Return what gives the backend of each step of a job: torch's own where sparse attention
    leaves the first ones dense.

    Args:
        word: as a plan names it.
        steps: of the job.

    Raises:
        ImportError: comfy-kitchen is needed, and is not installed.
    """
    attend, dense = self_attention_of(word), Attending.of(word).dense_steps(steps)
    return lambda step: attention if step < dense else attend
