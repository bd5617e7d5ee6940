"""Names and shapes of the transformer's tensors, in closed form from its config.

The names are those of diffusers' ``MiniMaxH3Transformer3DModel``; a test holds them equal. Free of
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from penstock.engine.families.minimax_h3.config import MODALITIES

Shapes: TypeAlias = dict[str, tuple[int, ...]]

BLOCKS = "transformer_blocks."

ADALN = "adaln_proj."
"""Begins the names, inside a block, of the projection that a job needs once."""

ENDS = ("proj_in.", "audio_proj_in.", "norm_out.norm.", "proj_out.", "audio_proj_out.")
"""Begin the names of what each forward pass needs outside the blocks."""
ONCE = (
    "context_embedder.", "time_embedder.", "token_refiner.", "norm_out.linear.", "norm_out.curve.",
)  # fmt: skip
"""Begin those of what serves once a job: it makes the text's rows and the time embedding."""

_SINGLE = {"proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out", "curve"}


def leaves_stream(local_name: str) -> bool:
    """Return whether a block's tensor, by its name inside the block, is of the AdaLN projection."""
    return local_name.startswith(ADALN)


def keeps_single(name: str) -> bool:
    """Return whether the makers keep a parameter in fp32 beside blocks in bf16: whole parts of its
    name say so."""
    return not _SINGLE.isdisjoint(name.split("."))


def run_outside(name: str) -> str:
    """Return the run of a pack in which a tensor outside the blocks lies."""
    return "once" if name.startswith(ONCE) else "rest"


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return every tensor of the transformer, in the order of its class.

    Where the time embedding is a curve (``time_table_size``), a table of its points stands for the
    layers that compute it, and what projects it is called ``curve``: it is narrow, and fp32.
    """
    dim, volume = config["hidden_size"], math.prod(config.get("patch_size", (1, 2, 2)))
    video, sound = config["in_channels"] * volume, config["audio_in_channels"]
    embedded, time = config["time_embed_hidden_dim"], config["time_embed_dim"]
    points, projection = config.get("time_table_size", 0), "linear"
    shapes = _linear("proj_in", dim, video) | _linear("audio_proj_in", dim, sound)
    shapes |= _linear("context_embedder", dim, config["text_dim"])
    if points:
        projection, time = "curve", config["adaln_rank"]
        shapes |= {"time_embedder.table": (points, time)}
    else:
        shapes |= _linear("time_embedder.linear_1", embedded, config["freq_dim"])
        shapes |= _linear("time_embedder.linear_2", time, embedded)
    plain = _plain_block(config)
    for index in range(config["num_refiner_layers"]):
        shapes |= _prefixed(f"token_refiner.refiner_blocks.{index}.", plain)
    shapes |= {"token_refiner.final_norm.weight": (dim,)}
    block = plain | _linear(f"{ADALN}{projection}", 6 * dim * MODALITIES, time)
    for index in range(config["num_layers"]):
        shapes |= _prefixed(f"{BLOCKS}{index}.", block)
    shapes |= {"norm_out.norm.weight": (dim,)} | _linear(f"norm_out.{projection}", 2 * dim, time)
    return shapes | _linear("proj_out", video, dim) | _linear("audio_proj_out", sound, dim)


def _plain_block(config: Mapping[str, Any]) -> Shapes:
    """Return the norms, attention and feed-forward: a refiner's block, and what each of the others
    streams."""
    dim, head, ffn = config["hidden_size"], config["attention_head_dim"], config["ffn_dim"]
    inner = config["num_attention_heads"] * head
    shapes: Shapes = {"norm1.weight": (dim,)}
    for name in ("to_q", "to_k", "to_v"):
        shapes |= _linear(f"attn.{name}", inner, dim, bias=False)
    shapes |= {"attn.norm_q.weight": (head,), "attn.norm_k.weight": (head,)}
    shapes |= _linear("attn.to_out.0", dim, inner, bias=False)
    shapes |= {"norm2.weight": (dim,)}
    shapes |= _linear("ff.net.0.proj", 2 * ffn, dim, bias=False)
    return shapes | _linear("ff.net.2", dim, ffn, bias=False)
