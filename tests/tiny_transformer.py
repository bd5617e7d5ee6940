"""Small random Wan transformers, and the lean forward over all of their blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def tiny_transformer(
    seed: int = 0,
    image_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """A random model with norm weights away from one; ``image_dim`` makes it image-to-video."""
    config = TINY | overrides
    if image_dim is not None:
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        config |= {"image_dim": image_dim, "added_kv_proj_dim": inner}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return nn.Module.to(model, dtype)  # diffusers' own warns about modules it keeps in fp32


def inputs(
    model: Any,
    latent: tuple[int, int, int],
    dtype: torch.dtype,
    image_tokens: int = 5,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random latents, text states and image states for ``model``."""
    config = model.config
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, config.in_channels, *latent, generator=draw).to(dtype)
    text = torch.randn(1, TEXT_TOKENS, config.text_dim, generator=draw).to(dtype)
    if config.image_dim is None:
        return latents, text, None
    image = torch.randn(1, image_tokens, config.image_dim, generator=draw).to(dtype)
    return latents, text, image


def lean(
    model: Any,
    latents: Tensor,
    texts: list[Tensor],
    image: Tensor | None,
    timestep: Tensor,
    chunk_tokens: int,
) -> list[Tensor]:
    """One result for each text, everything from the beginning."""
    branches: list[list[forward.CrossKV]] = []
    for text in texts:
        context = forward.prepare_context(model, text, image)
        shared = branches[0] if branches else [None] * len(model.blocks)
        branches.append(
            [
                forward.cross_kv(block.attn2, context, same)
                for block, same in zip(model.blocks, shared, strict=True)
            ]
        )
    frames, height, width = latents.shape[2:]
    return forward.denoise_forward(
        model,
        enumerate(model.blocks),
        latents,
        branches,
        forward.step_modulation(model, timestep, latents.dtype)[0],
        forward.rope_tables(model, (frames, height, width), latents.device),
        chunk_tokens,
    )
