"""A tiny random transformer of diffusers' MiniMax-H3, and what its pipeline gives it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
)
from torch import Tensor

from penstock.engine.families.minimax_h3.layout import Layout

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 24, "hidden_size": 40, "num_layers": 3,
    "num_refiner_layers": 2, "ffn_dim": 56, "in_channels": 4, "audio_in_channels": 6,
    "text_dim": 32, "freq_dim": 16, "time_embed_hidden_dim": 40, "time_embed_dim": 20,
    "rope_freq_dim": 4,
}  # fmt: skip


def shaken(model: Any, scale: float = 0.2) -> Any:
    """Zeros and ones moved, so that every parameter counts."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(scale * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def transformer(dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """The module, in ``dtype`` but for what it keeps in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(MiniMaxH3Transformer3DModel(**(TRANSFORMER | changed)))
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def packed(layout: Layout) -> dict[str, Tensor]:
    """Positions, tags and indices as the pipeline makes them."""
    sizes = layout.latents
    made = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.tensor(layout.tags), sizes.frames, sizes.height, sizes.width, sizes.sound,
        (1, 2, 2), 2, 2, 0, layout.anchors,
    )  # fmt: skip
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    return dict(zip(names, made[:5], strict=True))


def timesteps(layout: Layout, found: dict[str, Tensor], video: float, sound: float) -> Any:
    """The distinct timesteps of a step, and each row's among them."""
    given = layout.given.stop - layout.given.start
    return MiniMaxH3SetTimestepsStep.build_row_timesteps(
        found["video_indices"], found["audio_indices"], given, 0, len(layout.tags), video, sound,
        max(video, 0.999), 1.0,
    )  # fmt: skip
