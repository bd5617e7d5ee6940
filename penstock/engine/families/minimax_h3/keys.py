"""The names that files give to the transformer's tensors.

Published single files (ComfyUI's and the GGUF files made of them) keep the makers' names: queries,
keys and values are rows of one matrix, and the gate's rows come before those it gates. In pruned
files a curve stands for the time embedding (``TimeCurve`` in ``modules``). Sources: ComfyUI's
``comfy/ldm/minimax/model.py``, diffusers' ``single_file_utils.py``, and for pruned models in
diffusers' layout the loader of vLLM-Omni.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from penstock.engine.family.naming import Naming
from penstock.offload.checkpoint import TensorEntry

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

_CURVE = {"adaln_proj.linear": "adaln_proj.curve"}
_CURVES = _CURVE | {"adaln_proj.folded_bias": "adaln_proj.curve.bias"}
_OUT_CURVES = {"norm_out.linear": "norm_out.curve", "norm_out.folded_bias": "norm_out.curve.bias"}
"""Of pruned models in diffusers' layout: what is constant on the curve was added to the bias."""
_PLAIN_OUTSIDE = (
    "proj_in", "audio_proj_in", "context_embedder", "time_embedder", "token_refiner",
    "norm_out.norm", "proj_out", "audio_proj_out",
)  # fmt: skip

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
    Naming(
        "transformer", "diffusers",
        ("transformer_blocks.0.adaln_proj.folded_bias", "time_embedder.table", "token_refiner."),
        "transformer_blocks.", "transformer_blocks.",
        MappingProxyType({name: name for name in ("norm1", "norm2", "attn", "ff")} | _CURVES),
        MappingProxyType({name: name for name in _PLAIN_OUTSIDE} | _OUT_CURVES),
        ignored=("adaln_basis", "adaln_mean"), halves=_HALVES,
    ),
    Naming(
        "transformer", "ComfyUI", ("blocks.0.adaln_proj.", "video_patch_proj.", "adaln_t_table"),
        "blocks.", "transformer_blocks.",
        MappingProxyType(_INSIDE | _CURVE),
        MappingProxyType(_OUTSIDE | {
            "adaln_t_table": "time_embedder.table",
            "final_layer.adaln_proj.linear": "norm_out.curve",
        }),
        ignored=("rope.inv_freq",), config=MappingProxyType({"gate_first": True}), halves=_HALVES,
    ),
)  # fmt: skip

_SPARSE = "to_gate_compress"
_OWN_SHARDS = (
    "MiniMax-H3 in its makers' own shards, where queries, keys and values take turns head by head "
    "(their transformer in diffusers' layout is run)"
)


def stranger(entries: Mapping[str, TensorEntry]) -> str | None:
    """As `penstock.engine.family.protocol.Family.stranger`.

    The makers' own shards and published single files share names and shapes but not the order of
    rows, and nothing in them tells which it is; only that the makers' come as several files.
    """
    if not any("video_patch_proj" in name or "adaln_proj" in name for name in entries):
        return None
    if any(_SPARSE in name for name in entries):
        return "MiniMax-H3 with sparse attention"
    files = {entry.file for entry in entries.values() if entry.file.suffix != ".gguf"}
    fused = any(".attn.qkv_proj." in name for name in entries)
    return _OWN_SHARDS if fused and len(files) > 1 else None
