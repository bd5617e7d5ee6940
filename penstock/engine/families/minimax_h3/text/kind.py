"""Qwen3-VL, as files hold it: transformers' folder, ComfyUI's single file, llama.cpp's GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.engine.families.minimax_h3.text import config as configs
from penstock.engine.family.naming import Naming
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.keys import ComponentSource
from penstock.engine.model.component import Component, component_of

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "model.language_model.embed_tokens.weight"
LAYER, TOWER = "model.language_model.layers.", "model.visual.blocks."
_MOST_LAYERS = 256

_PARTS = {
    name: name for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
}
_GGUF = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _beyond(layer: str) -> tuple[str, ...]:
    """Return what begins the names of the layers that are never read."""
    return tuple(f"{layer}{number}." for number in range(configs.LAYERS, _MOST_LAYERS))


NAMINGS = (
    Naming(
        "text_encoder", "transformers",
        marks=(f"{LAYER}0.self_attn.q_norm.", f"{LAYER}{configs.LAYERS - 1}.", EMBEDDING),
        ignored=("lm_head.", "model.language_model.norm.", *_beyond(LAYER)),
    ),
    Naming(
        "text_encoder", "ComfyUI",
        marks=(
            "model.layers.0.self_attn.q_norm.", f"model.layers.{configs.LAYERS - 1}.",
            "model.embed_tokens.", "visual.",
        ),
        block="model.layers.", target=LAYER, inside=_PARTS,
        outside={
            "model.embed_tokens": EMBEDDING.removesuffix(".weight"), "visual": "model.visual",
        },
        ignored=("lm_head.", "model.norm.", *_beyond("model.layers.")),
    ),
    Naming(
        "text_encoder", "llama.cpp",
        marks=("blk.0.attn_q_norm.", f"blk.{configs.LAYERS - 1}.", "token_embd."),
        block="blk.", target=LAYER, inside=_GGUF,
        outside={"token_embd": EMBEDDING.removesuffix(".weight")},
        ignored=("output.", "output_norm.", "rope_freqs.", *_beyond("blk.")),
    ),
)  # fmt: skip
"""Sources: transformers' class; ComfyUI's ``comfy/text_encoders/qwen3vl.py``; llama.cpp's tensor
map of Qwen3. A file of llama.cpp holds no vision tower."""


def _linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Return every tensor that is read: embedding, the first layers, and the vision tower if there
    is one."""
    words, tower = configs.language(config), configs.vision(config)
    found: Shapes = {EMBEDDING: (words["vocab_size"], words["hidden_size"])}
    layer = layer_shapes(words)
    for index in range(configs.LAYERS):
        found |= _prefixed(f"{LAYER}{index}.", layer)
    return found if tower is None else found | tower_shapes(tower)


def layer_shapes(words: Mapping[str, Any]) -> Shapes:
    """Return the shapes of one layer of the language model."""
    width, inner, head = words["hidden_size"], words["intermediate_size"], words["head_dim"]
    queries, bias = words["num_attention_heads"] * head, words["attention_bias"]
    keys = words["num_key_value_heads"] * head
    layer: Shapes = {}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        layer |= _linear(f"self_attn.{name}_proj", rows, width, bias=bias)
    layer |= _linear("self_attn.o_proj", width, queries, bias=bias)
    layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    for name in ("gate", "up"):
        layer |= _linear(f"mlp.{name}_proj", inner, width, bias=False)
    layer |= _linear("mlp.down_proj", width, inner, bias=False)
    return layer | {
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
    }  # fmt: skip


def tower_block_shapes(tower: Mapping[str, Any]) -> Shapes:
    """Return the shapes of one layer of the vision tower."""
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    block = _norm("norm1", width) | _norm("norm2", width)
    block |= _linear("attn.qkv", 3 * width, width) | _linear("attn.proj", width, width)
    return block | _linear("mlp.linear_fc1", inner, width) | _linear("mlp.linear_fc2", width, inner)


def tower_rest_shapes(tower: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the vision tower outside its layers."""
    width, patch = tower["hidden_size"], tower["patch_size"]
    cube = (tower["in_channels"], tower["temporal_patch_size"], patch, patch)
    merged = width * tower["spatial_merge_size"] ** 2
    found: Shapes = {"patch_embed.proj.weight": (width, *cube), "patch_embed.proj.bias": (width,)}
    found |= {"pos_embed.weight": (tower["num_position_embeddings"], width)}
    mergers = [("merger", width)] + [
        (f"deepstack_merger_list.{number}", merged)
        for number in range(len(tower["deepstack_visual_indexes"]))
    ]
    for name, normed in mergers:
        found |= _norm(f"{name}.norm", normed) | _linear(f"{name}.linear_fc1", merged, merged)
        found |= _linear(f"{name}.linear_fc2", tower["out_hidden_size"], merged)
    return found


def tower_shapes(tower: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the whole vision tower."""
    found = _prefixed("model.visual.", tower_rest_shapes(tower))
    for index in range(tower["depth"]):
        found |= _prefixed(f"{TOWER}{index}.", tower_block_shapes(tower))
    return found


def _run(name: str) -> str:
    """Return what is read apart: the embedding by rows; the tower for pictures only, by its
    layers."""
    if name == EMBEDDING:
        return "embedding"
    if name.startswith(TOWER):
        return f"vision {name.removeprefix(TOWER).partition('.')[0]}"
    return "vision" if name.startswith("model.visual.") else "rest"


TEXT = ComponentKind(
    name="text_encoder",
    made_by=("transformers", "Qwen3VLForConditionalGeneration"),
    model_type="qwen3_vl",
    namings=NAMINGS,
    check=configs.check,
    derive=configs.derive,
    shapes=shapes,
    title=configs.title,
    defaults={},
    blocks=LAYER,
    count=lambda config: configs.LAYERS,
    run_outside=_run,
)


def _depth(config: Mapping[str, Any]) -> int:
    tower = configs.vision(config)
    return 0 if tower is None else int(tower["depth"])


VISION = replace(TEXT, name="vision", blocks=TOWER, count=_depth)
"""The vision tower of the same files, streamed by itself."""


def components(source: ComponentSource) -> dict[str, Component]:
    """Return the language model, and the vision tower where the files have one."""
    parts = {"text_encoder": component_of(source, only=())}
    if configs.vision(source.config) is not None:
        seeing = replace(source, kind=VISION)
        parts["vision"] = component_of(seeing, only=("model.visual.",), name="vision")
    return parts
