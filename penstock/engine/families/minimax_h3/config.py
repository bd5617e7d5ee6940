"""The transformer's config: the defaults of its class, and what the shapes of its tensors tell.

What shapes do not tell (the width of a head, rotary frequencies, epsilons) is the same in all
published files. Source: diffusers' ``MiniMaxH3Transformer3DModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.family.naming import ShapesOf
from penstock.errors import CheckpointError

MODALITIES = 3
"""Rows of a modulation table a timestep: video, text, sound."""
VIDEO, TEXT, SOUND = range(MODALITIES)

PATCH_TAKEN = (1, 2, 2)
CHANNELS = 2
"""Of the sound: the audio VAE takes them as two items of a batch."""

TRANSFORMER: Mapping[str, Any] = MappingProxyType({
    "num_attention_heads": 56, "attention_head_dim": 128, "hidden_size": 5376, "num_layers": 50,
    "num_refiner_layers": 2, "ffn_dim": 14336, "in_channels": 24, "audio_in_channels": 32,
    "patch_size": PATCH_TAKEN, "text_dim": 5120, "freq_dim": 256, "time_embed_hidden_dim": 5376,
    "time_embed_dim": 2688, "rope_freq_dim": 16, "rope_theta": 10000.0, "norm_eps": 1e-5,
    "qk_norm_eps": 1e-5, "final_norm_eps": 1e-5, "gate_first": False, "time_table_size": 0,
    "adaln_rank": 0,
})  # fmt: skip
"""Defaults of the class, and what is ours: ``gate_first`` (in files of other names than diffusers'
the gate's rows of a feed-forward layer come before those it gates). A pruned file has a curve in
place of the time embedding's layers: ``time_table_size`` points of ``adaln_rank`` coordinates; 0:
the model is whole."""

OURS = ("gate_first", "time_table_size", "adaln_rank")
"""Entries that diffusers' class does not take."""

SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {"_class_name": "MiniMaxH3Scheduler", "shift": 12.0}
)
"""The video's schedule where a model comes without its config."""

SOUND_SHIFT = 3.0
"""Of the sound's schedule, likewise."""


def derive_transformer(shapes: ShapesOf) -> dict[str, Any]:
    """As `penstock.engine.family.protocol.ComponentKind.derive`."""
    head = shapes.of("transformer_blocks.0.attn.norm_q.weight", 1)[0]
    inner, width = shapes.of("transformer_blocks.0.attn.to_q.weight", 2)
    if inner % head:
        raise CheckpointError(
            f"{shapes.where} is of an unknown size",
            expected=f"queries in heads of {head}",
            found=str(inner),
            remedy="Put the model's config.json beside the file.",
        )
    volume = PATCH_TAKEN[0] * PATCH_TAKEN[1] * PATCH_TAKEN[2]
    return _time(shapes) | {
        "num_attention_heads": inner // head,
        "attention_head_dim": head,
        "hidden_size": width,
        "num_layers": shapes.count("transformer_blocks."),
        "num_refiner_layers": shapes.count("token_refiner.refiner_blocks."),
        "ffn_dim": shapes.of("transformer_blocks.0.ff.net.2.weight", 2)[1],
        "in_channels": shapes.of("proj_in.weight", 2)[1] // volume,
        "audio_in_channels": shapes.of("audio_proj_in.weight", 2)[1],
        "text_dim": shapes.of("context_embedder.weight", 2)[1],
    }


def _time(shapes: ShapesOf) -> dict[str, Any]:
    """Return the entries of the time embedding: its layers, or its curve."""
    if "time_embedder.table" in shapes:
        points, width = shapes.of("time_embedder.table", 2)
        return {"time_table_size": points, "adaln_rank": width}
    embedded, waves = shapes.of("time_embedder.linear_1.weight", 2)
    return {
        "freq_dim": waves,
        "time_embed_hidden_dim": embedded,
        "time_embed_dim": shapes.of("time_embedder.linear_2.weight", 2)[0],
    }


def transformer_title(config: Mapping[str, Any]) -> str:
    """Return the model's name for people."""
    told = ["cut"] if config["num_layers"] != TRANSFORMER["num_layers"] else []
    told += ["pruned"] if config.get("time_table_size") else []
    return f"MiniMax-H3 ({', '.join(told)})" if told else "MiniMax-H3"
