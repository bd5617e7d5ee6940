"""MiniMax-H3's video VAE as modules of plain torch: names, shapes, and the forwards of its
convolutions and norms. `penstock.engine.families.minimax_h3.video_vae.vit` runs the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.families.minimax_h3.video_vae.config import VAE
from penstock.engine.family.layers import (
    Conv3d,
    LayerNorm,
    Linear,
    NetworkConfig,
    RMSNorm,
    parameter,
)


class MiniMaxH3VideoCausalConv3d(Conv3d):
    """A convolution that sees no later frame: zeros before the first, reflections beside the
    borders.

    Args:
        around: pixels that are added on each side.
        before: frames of zeros.
        mode: how pixels beyond the border are made.
    """

    def __init__(
        self, into: int, out: int, kernel: int, *, stride: Any = 1, around: int = 0,
        before: int = 0, mode: str = "reflect",
    ) -> None:  # fmt: skip
        super().__init__(into, out, kernel, stride=stride)
        self._around, self._before, self._mode = around, before, mode

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (1, c, t, h, w) to the same shape."""
        if self._around:
            hidden = F.pad(hidden, (self._around,) * 4 + (0, 0), mode=self._mode)
        if self._before:
            hidden = F.pad(hidden, (0, 0, 0, 0, self._before, 0))
        return F.conv3d(hidden, self.weight, self.bias, self.stride)


class MiniMaxH3VideoGroupNorm(nn.GroupNorm):
    """A group norm of each frame by itself."""

    def __init__(self, groups: int, width: int, epsilon: float) -> None:
        super().__init__(groups, width, eps=epsilon, device=torch.device("meta"))

    def reset_parameters(self) -> None:
        """Nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (1, c, t, h, w) to the same shape."""
        frames = hidden.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous()
        normed = super().forward(frames)
        whole = normed.view(len(hidden), -1, *normed.shape[1:2], *normed.shape[3:])
        return whole.transpose(1, 2).contiguous()


class MiniMaxH3VideoResnetBlock3d(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, config: NetworkConfig, into: int, out: int) -> None:
        super().__init__()
        groups, epsilon = config.norm_num_groups, config.norm_eps
        spread = {"around": 1, "before": 2, "mode": config.spatial_padding_mode}
        self.norm1 = MiniMaxH3VideoGroupNorm(groups, into, epsilon)
        self.conv1 = MiniMaxH3VideoCausalConv3d(into, out, 3, **spread)
        self.norm2 = MiniMaxH3VideoGroupNorm(groups, out, epsilon)
        self.conv2 = MiniMaxH3VideoCausalConv3d(out, out, 3, **spread)
        self.conv_shortcut = None if into == out else MiniMaxH3VideoCausalConv3d(into, out, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (1, into, t, h, w) to (1, out, t, h, w)."""
        inner = self.conv1(F.silu(self.norm1(hidden), inplace=True))
        inner = self.conv2(F.silu(self.norm2(inner), inplace=True))
        if self.conv_shortcut is not None:
            hidden = self.conv_shortcut(hidden)
        return inner.add_(hidden)  # type: ignore[no-any-return]


class MiniMaxH3VideoDownsample3d(nn.Module):
    """A convolution with a stride; halves a frame after one more row and column."""

    def __init__(self, config: NetworkConfig, width: int, temporal: int, spatial: int) -> None:
        super().__init__()
        self._halves, self._mode = spatial == 2, config.spatial_padding_mode
        self.conv = MiniMaxH3VideoCausalConv3d(
            width, width, 3, stride=(temporal, spatial, spatial), before=2
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (1, c, t, h, w) to the same shape."""
        if self._halves:
            hidden = F.pad(hidden, (0, 1, 0, 1, 0, 0), mode=self._mode)
        return self.conv(hidden)  # type: ignore[no-any-return]


class MiniMaxH3VideoDownBlock3d(nn.Module):
    """One level of the encoder."""

    def __init__(
        self, config: NetworkConfig, into: int, out: int, factors: tuple[int, int]
    ) -> None:
        super().__init__()
        widths = [into] + [out] * config.layers_per_block
        self.resnets = nn.ModuleList(
            MiniMaxH3VideoResnetBlock3d(config, *pair) for pair in pairwise(widths)
        )
        self.downsamplers = None
        if factors != (1, 1):
            self.downsamplers = nn.ModuleList([MiniMaxH3VideoDownsample3d(config, out, *factors)])

    def stages(self) -> Iterator[nn.Module]:
        """Yield its modules in order."""
        yield from self.resnets
        yield from self.downsamplers or ()


class MiniMaxH3VideoEncoder3d(nn.Module):
    """The encoder."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        spread = {"around": 1, "before": 2, "mode": config.spatial_padding_mode}
        self.conv_in = MiniMaxH3VideoCausalConv3d(config.in_channels, widths[0], 3, **spread)
        factors = zip(
            config.temporal_downsample_factors, config.spatial_downsample_factors, strict=True
        )
        pairs = zip([widths[0], *widths[:-1]], widths, factors, strict=True)
        self.down_blocks = nn.ModuleList(
            MiniMaxH3VideoDownBlock3d(config, into, out, each) for into, out, each in pairs
        )
        self.norm_out = MiniMaxH3VideoGroupNorm(config.norm_num_groups, widths[-1], config.norm_eps)
        self.conv_out = MiniMaxH3VideoCausalConv3d(
            widths[-1], 2 * config.latent_channels, 3, **spread
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map pixels (1, 3, t, h, w) to moments (1, 2 z, t', h', w')."""
        hidden = self.conv_in(hidden)
        for block in self.down_blocks:
            for stage in block.stages():  # type: ignore[operator]
                hidden = stage(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden), inplace=True))  # type: ignore[no-any-return]


class MiniMaxH3VideoAttention(nn.Module):
    """Projections and norms of the decoder's attention."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.heads, head = config.decoder_num_attention_heads, config.decoder_attention_head_dim
        norm = {"eps": config.decoder_norm_eps, "elementwise_affine": False}
        self.norm_q, self.norm_k = RMSNorm(head, **norm), RMSNorm(head, **norm)
        self.fused = config.fused
        if config.fused:
            self.to_qkv = Linear(width, 3 * width)
        else:
            self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])


class SwiGLU(nn.Module):
    """A gated linear layer: ``proj``. The gate is the second half of it, or the first."""

    def __init__(self, width: int, inner: int, *, gate_first: bool) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)
        self._gate = 0 if gate_first else 1

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to (..., inner)."""
        halves = self.proj(hidden).chunk(2, dim=-1)
        return F.silu(halves[self._gate]).mul_(halves[1 - self._gate])


class GatedFeedForward(nn.Module):
    """``net``: a `SwiGLU`, nothing (where dropout is trained), a linear layer."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        inner = config.decoder_ffn_mult * width
        gated = SwiGLU(width, inner, gate_first=config.fused)
        self.net = nn.ModuleList([gated, nn.Identity(), Linear(inner, width)])

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.net[2](self.net[0](hidden))  # type: ignore[no-any-return]


class MiniMaxH3VideoTransformerBlock(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width, eps=config.decoder_norm_eps)
        self.attn = MiniMaxH3VideoAttention(config, width)
        self.scale1 = parameter(width)
        self.norm2 = RMSNorm(width, eps=config.decoder_norm_eps)
        self.ff = GatedFeedForward(config, width)
        self.scale2 = parameter(width)


class MiniMaxH3VideoViTDecoder3d(nn.Module):
    """The decoder."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.decoder_num_attention_heads * config.decoder_attention_head_dim
        self.proj_in = Linear(config.latent_channels, width)
        self.register_tokens = parameter(1, config.decoder_num_register_tokens, width)
        self.transformer_blocks = nn.ModuleList(
            MiniMaxH3VideoTransformerBlock(config, width) for _ in range(config.decoder_num_layers)
        )
        self.norm_out = LayerNorm(width, eps=config.decoder_norm_eps)
        volume = 1
        for factor in config.spatial_downsample_factors:
            volume *= factor**2
        for factor in config.temporal_downsample_factors:
            volume *= factor
        self.proj_out = Linear(width, config.out_channels * volume)


class AutoencoderKLMiniMaxH3(nn.Module):
    """The VAE; either half may be left out."""

    def __init__(
        self, config: Mapping[str, Any], *, encodes: bool = True, decodes: bool = True
    ) -> None:
        super().__init__()
        self.config = own = NetworkConfig(VAE, config)
        latent = own.latent_channels
        if encodes:
            self.encoder = MiniMaxH3VideoEncoder3d(own)
            self.quant_conv = Conv3d(2 * latent, 2 * latent, 1)
        if decodes:
            self.post_quant_conv = Conv3d(latent, latent, 1)
            self.decoder = MiniMaxH3VideoViTDecoder3d(own)


def build_encoder(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the half that encodes; it has no blocks."""
    module = AutoencoderKLMiniMaxH3(config, decodes=False)
    return module.eval().requires_grad_(False), None


def build_decoder(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the half that decodes with one layer, and that layer."""
    module = AutoencoderKLMiniMaxH3({**config, "decoder_num_layers": 1}, encodes=False)
    return module.eval().requires_grad_(False), module.decoder.transformer_blocks[0]
