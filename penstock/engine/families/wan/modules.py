"""The networks of Wan as modules of plain torch: names, shapes, and the few forwards that the
free functions beside this file leave to a module.

They stand for the classes of diffusers and transformers whose names they bear, and compute what
these compute, bit for bit (tests hold names, shapes and bits equal). Importing the originals costs
two to three seconds, most of it for what runs no Wan model (training, quantisers, other models).
What is missing here is what nobody calls: whole forwards, loading, saving, dropout.

Parameters are made on the meta device and never filled: weights are bound for a visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.families.wan import config as configs
from penstock.engine.family.layers import (
    Conv2d,
    Conv3d,
    Embedding,
    LayerNorm,
    Linear,
    NetworkConfig,
    RMSNorm,
    parameter,
)

TRANSFORMER: Mapping[str, Any] = MappingProxyType({
    **configs.TRANSFORMER, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6, "added_kv_proj_dim": None,
})  # fmt: skip
TEXT: Mapping[str, Any] = MappingProxyType({
    **configs.TEXT, "vocab_size": 250112, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip
IMAGE: Mapping[str, Any] = MappingProxyType({
    **configs.IMAGE, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
})  # fmt: skip
VAE: Mapping[str, Any] = MappingProxyType({
    **configs.VAE, "decoder_base_dim": None, "attn_scales": (), "dropout": 0.0,
    "is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None,
    "scale_factor_temporal": 4, "scale_factor_spatial": 8,
    "latents_mean": (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    "latents_std": (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
})  # fmt: skip
"""Defaults of the originals' configs, as far as a module is made with them (a test compares)."""


class FP32LayerNorm(LayerNorm):
    """A layer norm computed in fp32, whatever its weights and its input are."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` normed, in their dtype."""
        weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
        normed = F.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(inputs.dtype)


class GELU(nn.Module):
    """A linear layer and GELU: ``proj``, and how it is approximated."""

    def __init__(self, into: int, out: int, approximate: str) -> None:
        super().__init__()
        self.proj = Linear(into, out)
        self.approximate = approximate

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., into) to (..., out)."""
        return F.gelu(self.proj(hidden), approximate=self.approximate)


class FeedForward(nn.Module):
    """``net``: a `GELU`, nothing (where dropout is trained), a linear layer."""

    def __init__(self, into: int, inner: int, out: int, approximate: str) -> None:
        super().__init__()
        parts = GELU(into, inner, approximate), nn.Identity(), Linear(inner, out)
        self.net = nn.ModuleList(parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., into) to (..., out)."""
        for module in self.net:
            hidden = module(hidden)
        return hidden


class TwoLinears(nn.Module):
    """Linear, activation, linear: of the text and of the time embedding."""

    def __init__(self, into: int, out: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(into, out), Linear(out, out)
        self._act = act

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., into) to (..., out)."""
        states = self._act(self.linear_1(states))
        return self.linear_2(states)  # type: ignore[no-any-return]


class Timesteps(nn.Module):
    """Cosines and sines of a timestep at ``channels / 2`` frequencies from 1 down to 1/10000."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (n,) to (n, channels), fp32."""
        half = self.num_channels // 2
        places = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000) * places / half)
        angles = timesteps[:, None].float() * frequencies[None, :]
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return F.pad(waves, (0, 1)) if self.num_channels % 2 else waves


class WanImageEmbedding(nn.Module):
    """Image states to the transformer's width."""

    def __init__(self, into: int, out: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(into)
        self.ff = FeedForward(into, into, out, "none")
        self.norm2 = FP32LayerNorm(out)
        self.pos_embed = None if positions is None else parameter(1, positions, into)

    def forward(self, states: Tensor) -> Tensor:
        """Map (1, n, into) to (1, n, out); with places for two pictures, (2, n, into) to
        (1, 2n, out)."""
        if self.pos_embed is not None:
            states = states.view(-1, self.pos_embed.shape[1], states.shape[-1]) + self.pos_embed
        return self.norm2(self.ff(self.norm1(states)))  # type: ignore[no-any-return]


class WanTimeTextImageEmbedding(nn.Module):
    """What the transformer is conditioned on, embedded."""

    def __init__(self, config: NetworkConfig, dim: int) -> None:
        super().__init__()
        self.timesteps_proj = Timesteps(config.freq_dim)
        self.time_embedder = TwoLinears(config.freq_dim, dim, F.silu)
        self.act_fn = nn.SiLU()
        self.time_proj = Linear(dim, 6 * dim)
        self.text_embedder = TwoLinears(config.text_dim, dim, _gelu_tanh)
        self.image_embedder = None
        if config.image_dim is not None:
            self.image_embedder = WanImageEmbedding(config.image_dim, dim, config.pos_embed_seq_len)


class WanRotaryPosEmbed(nn.Module):
    """Rotary angles of each position along time, height and width: ``freqs_cos``, ``freqs_sin``
    (positions, head width) fp32, each angle twice."""

    def __init__(self, head_dim: int, positions: int) -> None:
        super().__init__()
        self.h_dim = self.w_dim = 2 * (head_dim // 6)
        self.t_dim = head_dim - self.h_dim - self.w_dim
        self.register_buffer("freqs_cos", torch.empty(0), persistent=False)
        self.register_buffer("freqs_sin", torch.empty(0), persistent=False)
        wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        waves = [_axis(dim, positions, wide) for dim in (self.t_dim, self.h_dim, self.w_dim)]
        self.freqs_cos = torch.cat([cosines for cosines, _ in waves], dim=1)
        self.freqs_sin = torch.cat([sines for _, sines in waves], dim=1)


def _axis(dim: int, positions: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (positions, dim) of one axis, fp32."""
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=wide) / dim))
    angles = torch.outer(torch.arange(positions), frequencies)
    cosines, sines = (
        wave.repeat_interleave(2, dim=1).float() for wave in (angles.cos(), angles.sin())
    )
    return cosines, sines


class WanAttention(nn.Module):
    """Projections and norms of an attention; ``added``: the width of image states attended to."""

    def __init__(self, dim: int, heads: int, eps: float, added: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Identity()])
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        if added is not None:
            self.add_k_proj, self.add_v_proj = Linear(added, dim), Linear(added, dim)
            self.norm_added_k = RMSNorm(dim, eps=eps)


class WanTransformerBlock(nn.Module):
    """What `penstock.engine.families.wan.forward.block_forward` runs."""

    def __init__(self, config: NetworkConfig, dim: int) -> None:
        super().__init__()
        heads, eps = config.num_attention_heads, config.eps
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, eps)
        self.attn2 = WanAttention(dim, heads, eps, config.added_kv_proj_dim)
        self.norm2 = FP32LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim, dim, "tanh")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = parameter(1, 6, dim)


class WanTransformer3DModel(nn.Module):
    """Wan's transformer, with ``config.num_layers`` blocks."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(TRANSFORMER, config)
        dim, patch = own.num_attention_heads * own.attention_head_dim, tuple(own.patch_size)
        self.rope = WanRotaryPosEmbed(own.attention_head_dim, own.rope_max_seq_len)
        self.patch_embedding = Conv3d(own.in_channels, dim, patch, stride=patch)
        self.condition_embedder = WanTimeTextImageEmbedding(own, dim)
        self.blocks = nn.ModuleList(WanTransformerBlock(own, dim) for _ in range(own.num_layers))
        self.norm_out = FP32LayerNorm(dim, own.eps, elementwise_affine=False)
        self.proj_out = Linear(dim, (own.out_channels or own.in_channels) * math.prod(patch))
        self.scale_shift_table = parameter(1, 2, dim)


class UMT5LayerNorm(nn.Module):
    """Root mean square norm: the mean in fp32, the product in the weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        variance = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden = hidden.to(self.weight.dtype)
        return torch.mul(self.weight, hidden)


class UMT5Attention(nn.Module):
    """Projections of a layer, and the bias that it adds to its scores by distance."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.n_heads = config.num_heads
        self._buckets = config.relative_attention_num_buckets
        self._reach = config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = Embedding(self._buckets, config.num_heads)

    def compute_bias(self, queries: int, keys: int) -> Tensor:
        """Return (1, heads, queries, keys), all counted from the first token."""
        device = self.relative_attention_bias.weight.device
        distances = (
            torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None]
        )
        values: Tensor = self.relative_attention_bias(self._bucket(distances))
        return values.permute(2, 0, 1).unsqueeze(0)  # (queries, keys, heads) -> (1, h, q, k)

    def _bucket(self, distances: Tensor) -> Tensor:
        """Return the bucket of each signed distance: near ones have one each, far ones share by
        their logarithm.

        Half of the buckets are for keys ahead. Source: T5's relative positions, arXiv:1910.10683.
        """
        half = self._buckets // 2
        near = half // 2
        away = distances.abs()
        ratio = math.log(self._reach / near)
        log = torch.log(away.float() / near) / ratio * (half - near)
        far: Tensor = (near + log.to(torch.long)).clamp(max=half - 1)
        ahead = (distances > 0).to(torch.long) * half
        return torch.where(away < near, away, far).add_(ahead)


class UMT5LayerSelfAttention(nn.Module):
    """A block's first layer."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.SelfAttention = UMT5Attention(config)
        self.layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)


class UMT5DenseGatedActDense(nn.Module):
    """Projections of a gated feed-forward, and its activation."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        gate = config.feed_forward_proj.removeprefix("gated-")
        self.act = _ACTIVATIONS["gelu_new" if gate == "gelu" else gate]


class UMT5LayerFF(nn.Module):
    """A block's last layer."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.DenseReluDense = UMT5DenseGatedActDense(config)
        self.layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)


class UMT5Block(nn.Module):
    """What `penstock.engine.families.wan.umt5.encode_layers` runs."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([UMT5LayerSelfAttention(config), UMT5LayerFF(config)])


class UMT5Stack(nn.Module):
    """The encoder's blocks and its last norm."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(UMT5Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon)


class UMT5EncoderModel(nn.Module):
    """UMT5's encoder, with ``config.num_layers`` blocks."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(TEXT, config)
        self.shared = Embedding(own.vocab_size, own.d_model)
        self.encoder = UMT5Stack(own)


class CLIPVisionEmbeddings(nn.Module):
    """Weights of patches, class token and positions."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = parameter(width)
        self.patch_embedding = Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = Embedding((config.image_size // patch) ** 2 + 1, width)


class CLIPAttention(nn.Module):
    """Projections of a layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.scale = self.head_dim**-0.5
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            Linear(width, width) for _ in range(4)
        )


class CLIPMLP(nn.Module):
    """Projections of a feed-forward, and its activation."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.activation_fn = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)


class CLIPEncoderLayer(nn.Module):
    """What `penstock.engine.families.wan.clip.encode_layers` runs."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(width, config.num_attention_heads)
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = LayerNorm(width, eps=eps)


class CLIPEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )


class CLIPVisionModel(nn.Module):
    """CLIP's vision model, with ``config.num_hidden_layers`` layers."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(IMAGE, config)
        self.embeddings = CLIPVisionEmbeddings(own)
        self.pre_layrnorm = LayerNorm(own.hidden_size, eps=own.layer_norm_eps)
        self.encoder = CLIPEncoder(own)
        self.post_layernorm = LayerNorm(own.hidden_size, eps=own.layer_norm_eps)


class WanCausalConv3d(Conv3d):
    """A convolution that sees no later frame; ``_padding`` is its own, spatial ones twice."""

    def __init__(
        self, into: int, out: int, kernel: Sequence[int], padding: Sequence[int] = (0, 0, 0)
    ) -> None:
        super().__init__(into, out, tuple(kernel))
        frames, rows, cols = padding
        self._padding = (cols, cols, rows, rows, 2 * frames, 0)


class WanRMS_norm(nn.Module):  # noqa: N801 (its original's name)
    """Root mean square norm over the channels; ``sides``: dimensions after them."""

    def __init__(self, width: int, sides: int = 3) -> None:
        super().__init__()
        self.scale = width**0.5
        self.gamma = parameter(width, *(sides * [1]))


_CUBE = (3, 3, 3), (1, 1, 1)


class WanResidualBlock(nn.Module):
    """Two convolutions with their norms, and what goes past them."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = WanRMS_norm(into), WanRMS_norm(out)
        self.conv1, self.conv2 = (
            WanCausalConv3d(into, out, *_CUBE),
            WanCausalConv3d(out, out, *_CUBE),
        )
        self.conv_shortcut = nn.Identity() if into == out else WanCausalConv3d(into, out, (1, 1, 1))


class WanAttentionBlock(nn.Module):
    """Attention within a frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = WanRMS_norm(width, 2)
        self.to_qkv, self.proj = Conv2d(width, 3 * width, 1), Conv2d(width, width, 1)


class WanMidBlock(nn.Module):
    """Residual, attention, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([WanAttentionBlock(width)])
        self.resnets = nn.ModuleList(WanResidualBlock(width, width) for _ in range(2))


class WanResample(nn.Module):
    """Half or double the size, and by ``mode`` ("...3d") the rate; ``resample[1]`` convolves.
    ``out``: channels that doubling gives; None: half as many."""

    def __init__(self, width: int, mode: str, out: int | None = None) -> None:
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            spatial = Conv2d(width, out or width // 2, 3, padding=1)
        else:
            spatial = Conv2d(width, width, 3, stride=2)
        self.resample = nn.Sequential(nn.Identity(), spatial)
        if mode == "upsample3d":
            self.time_conv = WanCausalConv3d(width, 2 * width, (3, 1, 1), (1, 0, 0))
        elif mode == "downsample3d":
            self.time_conv = WanCausalConv3d(width, width, (3, 1, 1))


class AvgDown3D(nn.Module):
    """A shortcut past a down block: means of neighbours in time, space and channels."""

    def __init__(self, into: int, out: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_channels = out
        self.factor_t, self.factor_s = factor_t, factor_s
        self.factor = factor_t * factor_s**2
        self.group_size = into * self.factor // out

    def forward(self, frames: Tensor) -> Tensor:
        """Return (1, c, t, h, w), zeros before the first frame where ``t`` does not divide."""
        frames = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % self.factor_t, 0))
        batch, channels, count, height, width = frames.shape
        times, side = self.factor_t, self.factor_s
        count, height, width = count // times, height // side, width // side
        parts = frames.view(batch, channels, count, times, height, side, width, side)
        parts = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).contiguous()
        return parts.view(batch, self.out_channels, self.group_size, count, height, width).mean(2)


class DupUp3D(nn.Module):
    """A shortcut past an up block: what is repeated, and how often; free functions add it."""

    def __init__(self, into: int, out: int, factor_t: int, factor_s: int) -> None:
        super().__init__()
        self.out_channels = out
        self.factor_t, self.factor_s = factor_t, factor_s
        self.factor = factor_t * factor_s**2
        self.repeats = out * self.factor // into


class WanResidualDownBlock(nn.Module):
    """A stage of Wan2.2's encoder; ``mode``: of its resampling, None: it has none."""

    def __init__(self, into: int, out: int, count: int, mode: str | None) -> None:
        super().__init__()
        factor_t = 2 if mode is not None and mode.endswith("3d") else 1
        self.avg_shortcut = AvgDown3D(into, out, factor_t, 1 if mode is None else 2)
        widths = [into, *((count - 1) * [out])]
        self.resnets = nn.ModuleList(WanResidualBlock(width, out) for width in widths)
        self.downsampler = None if mode is None else WanResample(out, mode)


class WanResidualUpBlock(nn.Module):
    """A stage of Wan2.2's decoder, likewise."""

    def __init__(self, into: int, out: int, count: int, mode: str | None) -> None:
        super().__init__()
        factor_t = 2 if mode is not None and mode.endswith("3d") else 1
        self.avg_shortcut = None if mode is None else DupUp3D(into, out, factor_t, 2)
        widths = [into, *(count * [out])]
        self.resnets = nn.ModuleList(WanResidualBlock(width, out) for width in widths)
        self.upsampler = None if mode is None else WanResample(out, mode, out)


class WanEncoder3d(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_res_blocks = config.num_res_blocks
        self.temperal_downsample = list(config.temperal_downsample)
        into = config.base_dim
        self.conv_in = WanCausalConv3d(config.in_channels, into, *_CUBE)
        self.down_blocks = nn.ModuleList()
        for stage, factor in enumerate(config.dim_mult):
            width, last = config.base_dim * factor, stage + 1 == len(config.dim_mult)
            if config.is_residual:
                axes = "2d" if last or not config.temperal_downsample[stage] else "3d"
                mode = None if last else f"downsample{axes}"
                block = WanResidualDownBlock(into, width, config.num_res_blocks, mode)
                self.down_blocks.append(block)
                into = width
                continue
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(WanResidualBlock(into, width))
                into = width
            if not last:
                axes = "3d" if config.temperal_downsample[stage] else "2d"
                self.down_blocks.append(WanResample(width, f"downsample{axes}"))
        self.mid_block = WanMidBlock(into)
        self.norm_out = WanRMS_norm(into)
        self.conv_out = WanCausalConv3d(into, 2 * config.z_dim, *_CUBE)


class WanUpBlock(nn.Module):
    """A stage of the decoder."""

    def __init__(self, into: int, out: int, count: int, mode: str | None) -> None:
        super().__init__()
        widths = [into, *(count * [out])]
        self.resnets = nn.ModuleList(WanResidualBlock(width, out) for width in widths)
        self.upsamplers = None if mode is None else nn.ModuleList([WanResample(out, mode)])


class WanDecoder3d(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.temperal_upsample = list(config.temperal_downsample)[::-1]
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in reversed(config.dim_mult)]
        into = widths[0]
        self.conv_in = WanCausalConv3d(config.z_dim, into, *_CUBE)
        self.mid_block = WanMidBlock(into)
        self.up_blocks = nn.ModuleList()
        for stage, width in enumerate(widths):
            mode = None
            if stage + 1 < len(widths):
                mode = "upsample3d" if self.temperal_upsample[stage] else "upsample2d"
            kind = WanResidualUpBlock if config.is_residual else WanUpBlock
            self.up_blocks.append(kind(into, width, config.num_res_blocks, mode))
            into = width if config.is_residual else width // 2
        self.norm_out = WanRMS_norm(widths[-1])
        self.conv_out = WanCausalConv3d(widths[-1], config.out_channels, *_CUBE)


class AutoencoderKLWan(nn.Module):
    """Wan2.1's VAE, or with ``is_residual`` Wan2.2's."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = own = NetworkConfig(VAE, config)
        self.encoder = WanEncoder3d(own)
        self.quant_conv = WanCausalConv3d(2 * own.z_dim, 2 * own.z_dim, (1, 1, 1))
        self.post_quant_conv = WanCausalConv3d(own.z_dim, own.z_dim, (1, 1, 1))
        self.decoder = WanDecoder3d(own)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_new(x: Tensor) -> Tensor:
    """Compute GELU by tanh, operation by operation: fused it rounds otherwise."""
    cubed = 0.044715 * torch.pow(x, 3.0)
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + cubed)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "gelu": F.gelu, "gelu_new": _gelu_new, "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu, "relu": F.relu, "silu": F.silu,
})  # fmt: skip
