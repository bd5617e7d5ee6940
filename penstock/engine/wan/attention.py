"""Attention over (batch, tokens, heads, head width) tensors: the one seam for other backends."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked softmax attention by torch's own `scaled_dot_product_attention`.

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
