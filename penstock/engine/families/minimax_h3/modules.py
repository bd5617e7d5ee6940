"""The transformer as modules of plain torch: names and shapes, and the few forwards that the free
functions beside this file leave to a module.

They stand for diffusers' ``MiniMaxH3Transformer3DModel`` and its parts, and compute what these
compute, bit for bit (tests hold names, shapes and bits equal).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.families.minimax_h3.config import MODALITIES, TRANSFORMER
from penstock.engine.family.layers import Linear, NetworkConfig, RMSNorm


class PackedAttention(nn.Module):
    """Projections and norms of self-attention over a sequence of heads."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.heads, head = own.num_attention_heads, own.attention_head_dim
        dim, inner = own.hidden_size, own.num_attention_heads * own.attention_head_dim
        self.to_q, self.to_k, self.to_v = (Linear(dim, inner, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(head, eps=own.qk_norm_eps) for _ in range(2))
        self.to_out = nn.ModuleList([Linear(inner, dim, bias=False)])


class Gated(nn.Module):
    """``proj`` makes both what is gated and its gate."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.proj = Linear(own.hidden_size, 2 * own.ffn_dim, bias=False)
        self.gate_first = bool(own.gate_first)


class GatedFeedForward(nn.Module):
    """``net``: a `Gated`, nothing (where dropout is trained), a linear layer."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        down = Linear(own.ffn_dim, own.hidden_size, bias=False)
        self.net = nn.ModuleList([Gated(own), nn.Identity(), down])


class RefinerBlock(nn.Module):
    """Attention and feed-forward of the text's rows."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(own.hidden_size, eps=own.norm_eps)
        self.attn = PackedAttention(own)
        self.norm2 = RMSNorm(own.hidden_size, eps=own.norm_eps)
        self.ff = GatedFeedForward(own)


class AdaProjection(nn.Module):
    """From the time embedding to the modulation of all modalities."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        _add_projection(self, own, 6 * own.hidden_size * MODALITIES)


def _add_projection(owner: nn.Module, own: NetworkConfig, rows: int) -> None:
    """Give ``owner`` its projection of the time embedding: ``linear``, or ``curve`` of a pruned
    model."""
    if own.time_table_size:
        owner.add_module("curve", Linear(own.adaln_rank, rows))
    else:
        owner.add_module("linear", Linear(own.time_embed_dim, rows))


class PackedBlock(RefinerBlock):
    """A block whose rows are modulated by their timestep and modality."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__(own)
        self.adaln_proj = AdaProjection(own)


class TokenRefiner(nn.Module):
    """Blocks of the text's rows, and their last norm."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        blocks = (RefinerBlock(own) for _ in range(own.num_refiner_layers))
        self.refiner_blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(own.hidden_size, eps=own.final_norm_eps)


class TimeWaves(nn.Module):
    """Cosines and sines of a timestep at ``channels / 2`` frequencies from 1 down to 1/10000."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (n,) to (n, channels), fp32."""
        half = self._channels // 2
        places = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000) * places / half)
        angles = timesteps[:, None].float() * frequencies[None, :]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return F.pad(waves, (0, 1)) if self._channels % 2 else waves


class TimeEmbedder(nn.Module):
    """Waves to the time embedding."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(own.freq_dim, own.time_embed_hidden_dim)
        self.linear_2 = Linear(own.time_embed_hidden_dim, own.time_embed_dim)

    def forward(self, waves: Tensor) -> Tensor:
        """Map (n, freq_dim) to (n, time_embed_dim)."""
        return self.linear_2(F.silu(self.linear_1(waves)))  # type: ignore[no-any-return]


class TimeCurve(nn.Module):
    """The time embedding of a pruned model: a curve over the timesteps, by its points at even
    distances, in few coordinates. What the whole model computes from a timestep (its activation
    included) lies on it as far as the pruning kept it.

    Source: ComfyUI's ``comfy/ldm/minimax/model.py``.
    """

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(own.time_table_size, own.adaln_rank))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Interpolate between points: (n,), 0 to 1, to (n, adaln_rank), fp32."""
        last = len(self.table) - 1
        places = timesteps.clamp(0.0, 1.0) * last
        before = places.floor().long().clamp(max=last - 1)  # 1.0 ends the last interval
        share = (places - before).unsqueeze(1)
        return torch.lerp(self.table[before], self.table[before + 1], share)


class Rotary(nn.Module):
    """Angles of a token's place in time, height and width; one set of frequencies serves all."""

    def __init__(self, frequencies: int, theta: float) -> None:
        super().__init__()
        places = torch.arange(0, 2 * frequencies, 2, dtype=torch.float32)
        inverse = 1.0 / (theta ** (places / (2 * frequencies)))
        self.register_buffer("inv_freq", inverse, persistent=False)


class NormOut(nn.Module):
    """The last norm, and the projection of the time embedding to its shift and scale."""

    def __init__(self, own: NetworkConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(own.hidden_size, eps=own.final_norm_eps)
        _add_projection(self, own, 2 * own.hidden_size)


class MiniMaxH3Transformer3DModel(nn.Module):
    """MiniMax-H3's transformer, with ``config.num_layers`` blocks."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(TRANSFORMER, config)
        dim, video = own.hidden_size, own.in_channels * math.prod(own.patch_size)
        self.proj_in = Linear(video, dim)
        self.audio_proj_in = Linear(own.audio_in_channels, dim)
        self.context_embedder = Linear(own.text_dim, dim)
        pruned = bool(own.time_table_size)
        self.time_proj = nn.Identity() if pruned else TimeWaves(own.freq_dim)
        self.time_embedder = TimeCurve(own) if pruned else TimeEmbedder(own)
        self.rope = Rotary(own.rope_freq_dim, own.rope_theta)
        self.token_refiner = TokenRefiner(own)
        blocks = (PackedBlock(own) for _ in range(own.num_layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = NormOut(own)
        self.proj_out = Linear(dim, video)
        self.audio_proj_out = Linear(dim, own.audio_in_channels)


def build(config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Build the transformer on the meta device with one block, and that block."""
    module = MiniMaxH3Transformer3DModel(**(config | {"num_layers": 1}))
    return module.eval().requires_grad_(False), module.transformer_blocks[0]
