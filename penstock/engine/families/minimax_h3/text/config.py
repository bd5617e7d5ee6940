"""The config of Qwen3-VL as MiniMax-H3 uses it: its entries, their ranges, and what shapes tell.

Language model and vision tower have a config each inside one ``config.json``. MiniMax-H3 is
conditioned on ``hidden_states[50]``: what layer 50 gives, before any norm. Layers beyond it, the
last norm and the head of the language model are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.family.naming import ShapesOf
from penstock.engine.files.fields import Field, check_fields, flag, number, several, text, whole
from penstock.errors import CheckpointError

LAYERS = 50
"""Layers that run, of 64."""

LANGUAGE: Mapping[str, Any] = MappingProxyType({
    "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 5e6,
    "mrope_section": (24, 20, 20),
})  # fmt: skip
"""Of Qwen3-VL-32B, for what a config.json leaves out. Source: its published config."""

VISION: Mapping[str, Any] = MappingProxyType({
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304,
    "num_heads": 16, "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 5120, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24), "rope_theta": 10000.0,
})  # fmt: skip
"""Likewise, of its vision tower."""

_DEEPSTACK = {27: (8, 16, 24), 24: (5, 11, 17)}
"""After which layers of a tower of a depth states go to the language model, where nothing says."""

_WIDTH, _COUNT = whole(1, 1 << 20), whole(1, 4096)
_EVEN = Field(
    "an even number from 2 to 4,096",
    lambda value: type(value) is int and 2 <= value <= 4096 and value % 2 == 0,
)
_THETA = number(1, 1e12)
_LANGUAGE = {
    "vocab_size": whole(1, 1 << 24), "hidden_size": _WIDTH, "intermediate_size": _WIDTH,
    "num_hidden_layers": whole(1, 256), "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT, "head_dim": _EVEN, "hidden_act": text("silu"),
    "rms_norm_eps": number(0, 1), "attention_bias": flag(), "rope_theta": _THETA,
    "mrope_section": several(whole(0, 4096), 3, 3),
}  # fmt: skip
_VISION = {
    "depth": whole(1, 256), "hidden_size": _WIDTH, "hidden_act": text("gelu_pytorch_tanh"),
    "intermediate_size": _WIDTH, "num_heads": _COUNT, "in_channels": whole(3, 3),
    "patch_size": whole(1, 256), "spatial_merge_size": whole(1, 16),
    "temporal_patch_size": whole(1, 16), "out_hidden_size": _WIDTH,
    "num_position_embeddings": whole(1, 1 << 20),
    "deepstack_visual_indexes": several(whole(0, 255), 0, 64), "rope_theta": _THETA,
}  # fmt: skip


def language(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's entries of ``config``, gaps filled."""
    own = dict(config.get("text_config") or {})
    return {**LANGUAGE, **_rope(own), **{k: v for k, v in own.items() if k in LANGUAGE}}


def vision(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the vision tower's entries of ``config``, gaps filled; None: the file has no tower."""
    own = config.get("vision_config")
    if own is None:
        return None
    return {**VISION, **_rope(own), **{k: v for k, v in own.items() if k in VISION}}


def _rope(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what newer configs say in ``rope_parameters`` and older ones in ``rope_scaling``."""
    told: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        entries = own.get(name)
        if isinstance(entries, Mapping):
            told |= {k: v for k, v in entries.items() if k in ("rope_theta", "mrope_section")}
    return told


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise _unfit(where, f"{name} as an object", type(config[name]).__name__)
    check_fields({k: v for k, v in config.items() if not isinstance(v, Mapping)}, {}, where)
    known, tower = language(config), vision(config)
    check_fields(known, _LANGUAGE, where)
    if known["num_hidden_layers"] < LAYERS:
        raise _unfit(
            where, f"{LAYERS} layers or more, as MiniMax-H3 reads layer {LAYERS}",
            str(known["num_hidden_layers"]),
        )  # fmt: skip
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise _unfit(where, "num_attention_heads as a multiple of num_key_value_heads", "others")
    if sum(known["mrope_section"]) * 2 != known["head_dim"]:
        raise _unfit(where, "an mrope_section that adds up to half of head_dim", "another")
    if tower is not None:
        check_fields(tower, _VISION, where)
        _check_tower(where, known, tower)


def _check_tower(where: str, known: Mapping[str, Any], tower: Mapping[str, Any]) -> None:
    if tower["out_hidden_size"] != known["hidden_size"]:
        raise _unfit(
            where, f"out_hidden_size {known['hidden_size']}, the language model's width",
            str(tower["out_hidden_size"]),
        )  # fmt: skip
    if tower["hidden_size"] % (4 * tower["num_heads"]):
        raise _unfit(where, "heads of a width that 4 divides in the vision tower", "others")
    if int(tower["num_position_embeddings"] ** 0.5) ** 2 != tower["num_position_embeddings"]:
        raise _unfit(where, "a square of num_position_embeddings", "another number")
    if any(index >= tower["depth"] for index in tower["deepstack_visual_indexes"]):
        raise _unfit(where, f"deepstack_visual_indexes below {tower['depth']}", "others")


def _unfit(where: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is not a text encoder of MiniMax-H3",
        expected=expected,
        found=found,
        remedy="Use the Qwen3-VL that the model came with.",
    )


def derive(shapes: ShapesOf) -> dict[str, Any]:
    """Return the config that shapes tell, under transformers' names."""
    start = "model.language_model."
    vocabulary, width = shapes.of(f"{start}embed_tokens.weight", 2)
    block = f"{start}layers.0."
    (head,) = shapes.of(f"{block}self_attn.q_norm.weight", 1)
    quarter = head // 8
    config: dict[str, Any] = {
        "model_type": "qwen3_vl",
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes.of(f"{block}mlp.gate_proj.weight", 2)[0],
            "num_hidden_layers": shapes.count(f"{start}layers."),
            "num_attention_heads": shapes.of(f"{block}self_attn.q_proj.weight", 2)[0] // head,
            "num_key_value_heads": shapes.of(f"{block}self_attn.k_proj.weight", 2)[0] // head,
            "head_dim": head,
            # Qwen's are 24, 20 and 20 of 64
            "mrope_section": [24, 20, 20] if head == 128 else [2 * quarter, quarter, quarter],
        },
    }
    if "model.visual.patch_embed.proj.weight" in shapes:
        config["vision_config"] = _derive_tower(shapes)
    return config


def _derive_tower(shapes: ShapesOf) -> dict[str, Any]:
    start = "model.visual."
    width, colours, frames, patch, _ = shapes.of(f"{start}patch_embed.proj.weight", 5)
    out, merged = shapes.of(f"{start}merger.linear_fc2.weight", 2)
    depth = shapes.count(f"{start}blocks.")
    mergers = 0
    if f"{start}deepstack_merger_list.0.norm.weight" in shapes:
        mergers = shapes.count(f"{start}deepstack_merger_list.")
    indexes = _DEEPSTACK.get(depth, ())
    if len(indexes) != mergers:
        raise _unfit(
            shapes.where, f"a vision tower of {' or '.join(map(str, _DEEPSTACK))} layers",
            f"{depth} layers, {mergers} mergers and no config.json",
        )  # fmt: skip
    return {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": shapes.of(f"{start}blocks.0.mlp.linear_fc1.weight", 2)[0],
        "in_channels": colours,
        "patch_size": patch,
        "temporal_patch_size": frames,
        "spatial_merge_size": round((merged / width) ** 0.5),
        "out_hidden_size": out,
        "num_position_embeddings": shapes.of(f"{start}pos_embed.weight", 2)[0],
        "deepstack_visual_indexes": list(indexes),
    }


def width_of(config: Mapping[str, Any]) -> int:
    """Return the width of the states that it gives."""
    return int(language(config)["hidden_size"])


def title(config: Mapping[str, Any]) -> str:
    """Return the text encoder's name for people."""
    known = language(config)
    size = "32B" if (known["hidden_size"], known["intermediate_size"]) == (5120, 25600) else ""
    return f"Qwen3-VL-{size}" if size else f"Qwen3-VL ({known['hidden_size']} wide)"
