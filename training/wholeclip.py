"""The Wan VAE run over whole clips at once.

``AutoencoderKLWan`` walks a clip in chunks of four frames and carries a cache of past frames
through every causal convolution.  That saves memory on large videos and costs time on small ones.
The two functions here give the same numbers in one pass, which training needs;
``tests/training`` compares them with the stock path.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of ``x`` (b, c, t, h, w)."""
    b, _, t, _, _ = x.shape
    y: Tensor = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (b, t)).transpose(1, 2)


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """Down- or upsample ``x`` (b, c, t, h, w); the first frame never mixes with time."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        b, c, t, h, w = rest.shape
        pairs = layer.time_conv(rest).reshape(b, 2, c, t, h, w)
        x = torch.cat([first, pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)], dim=2)
    x = _per_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def encode_moments(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Mean and log-variance (b, 2z, 1+(t-1)/4, h/8, w/8) of clips ``x``, (b, 3, t, h, w)."""
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    moments: Tensor = vae.quant_conv(x)
    return moments


def decode_clip(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Frames (b, 3, 1+4(t-1), 8h, 8w) of latents ``z`` (b, z, t, h, w), not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for layer in block.upsamplers or ():
            x = _resample(layer, x)
    frames: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return frames
