"""Qwen3-VL as modules of plain torch: names and shapes as transformers has them, and the forwards
of its small parts. What runs them is `penstock.engine.families.minimax_h3.text.encode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.families.minimax_h3.text.config import language, vision
from penstock.engine.family.layers import (
    Conv3d,
    Embedding,
    LayerNorm,
    Linear,
    NetworkConfig,
    parameter,
)

_EPSILON = 1e-6  # of every norm in the vision tower


class Qwen3VLTextRMSNorm(nn.Module):
    """A root mean square norm in fp32, rounded before it is scaled."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.variance_epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` normed, in its dtype."""
        wide = hidden.to(torch.float32, copy=True)
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide *= torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


class Qwen3VLTextAttention(nn.Module):
    """Projections and norms of an attention with fewer keys and values than queries."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = head
        self.q_proj = Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * head, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * head, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head, width, bias=bias)
        self.q_norm = Qwen3VLTextRMSNorm(head, config.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(head, config.rms_norm_eps)


class Qwen3VLTextMLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.down_proj(F.silu(self.gate_proj(hidden)).mul_(self.up_proj(hidden)))  # type: ignore[no-any-return]


class Qwen3VLTextDecoderLayer(nn.Module):
    """One layer of the language model."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.self_attn = Qwen3VLTextAttention(config)
        self.mlp = Qwen3VLTextMLP(config)
        self.input_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3VLTextModel(nn.Module):
    """The language model without its last norm. Its embedding is read by rows."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = (Qwen3VLTextDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)


class Qwen3VLVisionPatchEmbed(nn.Module):
    """Pixels of a patch to its states."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (patches, values) to (patches, width)."""
        cubes = pixels.view(-1, self.proj.in_channels, *self.proj.kernel_size)
        return self.proj(cubes.to(self.proj.weight.dtype)).view(len(pixels), -1)  # type: ignore[no-any-return]


class Qwen3VLVisionAttention(nn.Module):
    """Projections of an attention within a picture."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)


class Qwen3VLVisionMLP(nn.Module):
    """A feed-forward network with a GELU by tanh."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden), approximate="tanh"))  # type: ignore[no-any-return]


class Qwen3VLVisionBlock(nn.Module):
    """One layer of the vision tower."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, eps=_EPSILON)
        self.norm2 = LayerNorm(config.hidden_size, eps=_EPSILON)
        self.attn = Qwen3VLVisionAttention(config)
        self.mlp = Qwen3VLVisionMLP(config)


class Qwen3VLVisionPatchMerger(nn.Module):
    """Patches that lie together to one token of the language model; normed before, or after."""

    def __init__(self, config: NetworkConfig, *, after: bool) -> None:
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = LayerNorm(self.merged if after else config.hidden_size, eps=_EPSILON)
        self.linear_fc1 = Linear(self.merged, self.merged)
        self.linear_fc2 = Linear(self.merged, config.out_hidden_size)
        self._after = after

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (patches, width) to (tokens, width of the language model)."""
        states = hidden.view(-1, self.merged) if self._after else hidden
        normed = self.norm(states).view(-1, self.merged)
        return self.linear_fc2(F.gelu(self.linear_fc1(normed)))  # type: ignore[no-any-return]


class Qwen3VLVisionModel(nn.Module):
    """The vision tower."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Qwen3VLVisionPatchEmbed(config)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Qwen3VLVisionBlock(config) for _ in range(config.depth))
        self.merger = Qwen3VLVisionPatchMerger(config, after=False)
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3VLVisionPatchMerger(config, after=True) for _ in config.deepstack_visual_indexes
        )


class Qwen3VLModel(nn.Module):
    """Both towers; either may be left out."""

    def __init__(self, words: NetworkConfig | None, tower: NetworkConfig | None) -> None:
        super().__init__()
        if tower is not None:
            self.visual = Qwen3VLVisionModel(tower)
        if words is not None:
            self.language_model = Qwen3VLTextModel(words)


class Qwen3VLForConditionalGeneration(nn.Module):
    """Qwen3-VL without the head of its language model."""

    def __init__(self, words: NetworkConfig | None, tower: NetworkConfig | None) -> None:
        super().__init__()
        self.model = Qwen3VLModel(words, tower)


def build_language(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the language model with one layer, and that layer."""
    words = NetworkConfig({}, {**language(config), "num_hidden_layers": 1})
    module = Qwen3VLForConditionalGeneration(words, None)
    return module.eval().requires_grad_(False), module.model.language_model.layers[0]


def build_vision(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the vision tower with one layer, and that layer."""
    found = vision(config)
    assert found is not None
    tower = NetworkConfig({}, {**found, "depth": 1})
    module = Qwen3VLForConditionalGeneration(None, tower)
    return module.eval().requires_grad_(False), module.model.visual.blocks[0]
