"""The names that files give to the transformer's tensors.

Published single files (ComfyUI's and the GGUF files made of them) keep the makers' names: queries,
keys and values are rows of one matrix, and the gate's rows come before those it gates. Sources:
ComfyUI's ``comfy/ldm/minimax/model.py``, diffusers' ``single_file_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from penstock.engine.family.naming import Naming

_REFINERS = 8
"""Blocks of the refiner that are named; it has two."""

_INSIDE = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv_proj": "attn.to_{qkv}",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}

_OUTSIDE = {
    "video_patch_proj": "proj_in",
    "audio_patch_proj": "audio_proj_in",
    "condition_proj": "context_embedder",
    "time_embedder.proj_in": "time_embedder.linear_1",
    "time_embedder.proj_out": "time_embedder.linear_2",
    "token_refiner.final_norm": "token_refiner.final_norm",
    "final_layer.norm": "norm_out.norm",
    "final_layer.adaln_proj.linear": "norm_out.linear",
    "final_layer.video_out": "proj_out",
    "final_layer.audio_out": "audio_proj_out",
    **{
        f"token_refiner.blocks.{index}.{theirs}": f"token_refiner.refiner_blocks.{index}.{ours}"
        for index in range(_REFINERS)
        for theirs, ours in _INSIDE.items()
    },
}

_HALVES = ("ff.net.0.proj",)

NAMINGS = (
    Naming(
        "transformer", "diffusers",
        ("transformer_blocks.0.adaln_proj.", "token_refiner.refiner_blocks."), halves=_HALVES,
    ),
    Naming(
        "transformer", "MiniMax", ("blocks.0.adaln_proj.", "video_patch_proj."),
        "blocks.", "transformer_blocks.",
        MappingProxyType(_INSIDE | {"adaln_proj.linear": "adaln_proj.linear"}),
        MappingProxyType(_OUTSIDE), ignored=("rope.inv_freq",),
        config=MappingProxyType({"gate_first": True}), halves=_HALVES,
    ),
)  # fmt: skip

_STRANGERS = (
    ("adaln_t_table", "MiniMax-H3 pruned to tables of its timesteps"),
    ("to_gate_compress", "MiniMax-H3 with sparse attention"),
)


def stranger(names: Iterable[str]) -> str | None:
    """Return the model akin to MiniMax-H3 whose tensors bear these names, if it is not run."""
    every = tuple(names)
    if not any("video_patch_proj" in name or "adaln_proj" in name for name in every):
        return None
    return next((title for mark, title in _STRANGERS if any(mark in name for name in every)), None)
