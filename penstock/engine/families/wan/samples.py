"""What `penstock doctor` measures of Wan's own operations: a block of the lean forward, and a
residual block of the VAE, each as a plan counts it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS, Flops, denoise_flops
from penstock.engine.families.wan.cost.vae import VaeWork, residual_work
from penstock.engine.families.wan.spec import TransformerSpec
from penstock.engine.families.wan.vae_layers import Past, residual
from penstock.engine.machine.samples import Samples
from penstock.profiles.manifest import Weights
from penstock.profiles.tiling import Window

_HEADS, _HEAD_WIDTH, _FFN = 8, 64, 2048


@dataclass(frozen=True)
class ForwardSample:
    """One block of the lean forward on random weights, as a plan counts it."""

    model: Any
    latents: Tensor
    cross: list[list[forward.CrossKV]]
    step: forward.StepModulation
    rope: forward.Rope

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, tokens: int) -> ForwardSample:
        from diffusers import WanTransformer3DModel

        side = 2 * math.isqrt(tokens)
        model = WanTransformer3DModel(
            num_attention_heads=_HEADS, attention_head_dim=_HEAD_WIDTH, in_channels=16,
            out_channels=16, text_dim=64, freq_dim=64, ffn_dim=_FFN, num_layers=1,
        )  # fmt: skip
        rope = forward.rope_tables(model, (1, side, side), device)  # fp32, as a model's own
        model = model.to(device, dtype)
        text = torch.randn(1, TEXT_TOKENS, 64, device=device, dtype=dtype)
        context = forward.prepare_context(model, text, None)
        return cls(
            model,
            torch.randn(1, 16, 1, side, side, device=device, dtype=dtype),
            [[forward.cross_kv(model.blocks[0].attn2, context)]],
            forward.step_modulation(model, torch.zeros(1, device=device), dtype)[0],
            rope,
        )

    def __call__(self, chunk_tokens: int) -> object:
        blocks = enumerate(self.model.blocks)
        return forward.denoise_forward(
            self.model, blocks, self.latents, self.cross, self.step, self.rope, chunk_tokens
        )

    def flops(self) -> Flops:
        """As the planner counts it."""
        config = self.model.config
        spec = TransformerSpec(
            weights=Weights(0, (0,), 4), cross_block_bytes=(0,), num_layers=1,
            num_attention_heads=_HEADS, attention_head_dim=_HEAD_WIDTH, ffn_dim=config.ffn_dim,
            in_channels=16, out_channels=16, text_dim=64, freq_dim=64, patch_size=(1, 2, 2),
        )  # fmt: skip
        return denoise_flops(spec, self.tokens, 0)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return _HEAD_WIDTH * _HEADS

    @property
    def attended(self) -> int:
        """Of the grid, and of the prompt."""
        return self.tokens + TEXT_TOKENS

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return (self.latents.shape[-1] // 2) ** 2


def residual_sample(
    width: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[VaeWork, Callable[[], object]]:
    """Return a residual block on the next frame: what it computes, and how to let it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    block = WanResidualBlock(width, width).to(device, dtype)
    frame = torch.randn(1, width, 1, side, side, device=device, dtype=dtype)
    past = Past()
    windows = (Window.whole(side, side),) * 3
    return residual_work(width, side), lambda: residual(block, past, windows, frame)


SAMPLES = Samples(forward=ForwardSample.make, residual=residual_sample)
