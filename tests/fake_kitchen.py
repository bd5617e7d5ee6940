"""A stand-in for comfy-kitchen, for machines without a GPU: attention in 8 bits by plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def quantising(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (1, heads, tokens, width) over queries, keys and values rounded to int8, each token
    of each head with its scale."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
        return (x.float() / scale).round().to(torch.int8).float() * scale

    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v))
    found = F.scaled_dot_product_attention(rounded(q), rounded(k), rounded(v))
    return found.to(q.dtype).contiguous()


def allocating(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The tensors that comfy-kitchen 0.2.40 makes (`_int8_attention_cuda`), and no arithmetic."""
    heads, queries, width = q.shape[1:]
    keys = k.shape[2]
    wide = 64 if width <= 64 else 128 if width <= 128 else 256
    if wide != width:
        q, k, v = (F.pad(x, (0, wide - width)) for x in (q, k, v))
    tile = 128 if wide >= 128 and keys > 1024 else 64
    tiles = -(-keys // tile)
    blocks = -(-queries // 128) * (64 if wide == 256 else 32)
    held = [torch.empty(x.shape, dtype=torch.int8) for x in (q, k)]
    held.append(torch.empty(heads * wide, tiles * tile, dtype=torch.int8))
    held += [torch.empty(heads * count) for count in (blocks, 4 * tiles, wide)]
    held.append(torch.empty(heads, dtype=torch.int32))
    made = torch.bfloat16 if q.dtype == torch.float32 else q.dtype
    result = torch.empty(1, heads, queries, wide, dtype=made)[..., :width]
    return result.float() if q.dtype == torch.float32 else result


def install(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel = quantising, *, available: bool = True
) -> None:
    """Let ``import comfy_kitchen`` find a module with that kernel, which says that the device has
    it or has it not."""
    module = ModuleType("comfy_kitchen")
    vars(module).update(int8_attention=kernel, int8_attention_is_available=lambda device: available)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", module)
