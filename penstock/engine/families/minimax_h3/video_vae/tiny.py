"""A small random video VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

CONFIG: dict[str, Any] = {
    "latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "decoder_num_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 16, "latents_mean": (0.1, -0.2, 0.3, 0.0),
    "latents_std": (1.2, 0.9, 1.1, 1.0),
}  # fmt: skip


def vae(dtype: torch.dtype = torch.float32, channels: int = 4) -> Any:
    """Return diffusers' model as `from_pretrained` gives it in ``dtype``: what is sensitive stays
    in fp32. Norms, scales and biases are shaken, so that each one counts.

    Args:
        channels: of its latents.
    """
    from diffusers import AutoencoderKLMiniMaxH3

    model = AutoencoderKLMiniMaxH3(**of_channels(CONFIG, channels)).eval().requires_grad_(False)
    kept = set(model._keep_in_fp32_modules)
    for name, each in model.named_parameters():
        if each.ndim == 1 or "token" in name:
            each.data.add_(0.2 * torch.randn_like(each))
        if not kept & set(name.split(".")):
            each.data = each.data.to(dtype)
    return model


def of_channels(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return a VAE's config for so many channels of latents, its statistics in turn."""
    each = {name: (config[name] * channels)[:channels] for name in ("latents_mean", "latents_std")}
    return {**config, **each, "latent_channels": channels}
