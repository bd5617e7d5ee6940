"""A small random audio VAE."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from penstock.engine.families.minimax_h3.video_vae.tiny import of_channels

CONFIG: dict[str, Any] = {
    "encoder_dim": 4, "encoder_rates": (2, 4), "latent_dim": 24, "latent_channels": 6,
    "num_attention_heads": 2, "decoder_dim": 16, "decoder_rates": (4, 2),
    "decoder_kernel_sizes": (8, 4), "resblock_kernel_sizes": (3, 7),
    "resblock_dilation_sizes": ((1, 3), (1, 5)), "sampling_rate": 320,
    "latents_mean": [0.1, -0.1, 0.2, 0.0, 0.3, -0.3], "latents_std": [1.0, 0.9, 1.1, 1.2, 0.8, 1.0],
}  # fmt: skip


def audio_vae(channels: int = 6) -> Any:
    """Return diffusers' model; its lengths and biases are shaken, so that each one counts.

    Args:
        channels: of its latents.
    """
    from diffusers import AutoencoderKLMiniMaxH3Audio

    with warnings.catch_warnings():  # of torch, about the way in which diffusers norms weights
        warnings.simplefilter("ignore")
        whole = of_channels(CONFIG, channels) | {"latent_dim": 4 * channels}
        model = AutoencoderKLMiniMaxH3Audio(**whole).eval().requires_grad_(False)
    for each in model.parameters():
        each.data.add_(0.1 * torch.randn_like(each))
    return model
