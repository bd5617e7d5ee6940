"""Small random VAEs of the true architecture, and diffusers' own results on them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn


def tiny_vae(dtype: torch.dtype = torch.float64, **config: Any) -> AutoencoderKLWan:
    """A random VAE in which a pixel at the rim of a receptive field still shows.

    Large convolutions outweigh the skip connections; a small last one keeps pixels off the clamp.
    """
    torch.manual_seed(config.pop("seed", 0))
    vae = AutoencoderKLWan(
        **{"base_dim": 4, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4} | config
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("bias") or name.endswith("gamma"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "conv" in name:
                parameter.mul_(3.0)
        vae.decoder.conv_out.weight.mul_(0.1)
        vae.decoder.conv_out.bias.mul_(0.1)
    return nn.Module.to(vae, dtype).eval()


@torch.no_grad()
def whole_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """diffusers' decoding, without tiles.

    Its enlargement goes through float32, which copies half precision exactly but rounds float64:
    for float64 the same enlargement without that cast takes its place.
    """
    if latents.dtype == torch.float64:
        for module in vae.decoder.modules():
            if isinstance(module, WanUpsample):
                module.forward = nn.Upsample.forward.__get__(module)
    return vae.decode(latents).sample


@torch.no_grad()
def whole_encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """diffusers' encoding, without tiles: the mode of the posterior."""
    return vae.encode(clip).latent_dist.mode()
