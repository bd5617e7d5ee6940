"""A small random Qwen3-VL with its tokenizer and its picture processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from penstock.engine.families.minimax_h3.text.patches import MARKS

_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS, "<|video_pad|>")
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2,
    "temporal_patch_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 65536},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 51, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
_VISION = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2],
}  # fmt: skip


def vocabulary() -> dict[str, int]:
    """Return a token a byte, then Qwen's marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *_MARKS])}


def tokenizer() -> Any:
    """Return transformers' tokenizer of `vocabulary`."""
    from transformers import Qwen2TokenizerFast

    made = Qwen2TokenizerFast(vocab=vocabulary(), merges=[])
    made.add_special_tokens({"additional_special_tokens": list(_MARKS[1:])})
    return made


def encoder(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    """Return transformers' model, random: norms and biases are shaken, so that each one counts.

    Args:
        text, vision: config entries that replace the small ones.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    known = vocabulary()
    begin, pad, end = MARKS
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(known), **_TEXT, **(text or {})},
        vision_config={**_VISION, **(vision or {})},
        image_token_id=known[pad],
        video_token_id=known["<|video_pad|>"],
        vision_start_token_id=known[begin],
        vision_end_token_id=known[end],
    )
    model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for each in model.parameters():
        each.data.add_(0.1 * torch.randn_like(each))
    return model


def write(
    folder: Path, dtype: torch.dtype = torch.float32, changed: dict[str, Any] | None = None
) -> Any:
    """Write encoder, tokenizer and processor into their folders under ``folder``, as diffusers has
    them; returns the encoder.

    Args:
        changed: entries of the text's config.
    """
    told = changed or {}
    seen = {"out_hidden_size": told["hidden_size"]} if "hidden_size" in told else {}
    model = encoder(told, seen).to(dtype)
    model.save_pretrained(folder / "text_encoder", safe_serialization=True)
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "processor").mkdir(parents=True, exist_ok=True)
    config = json.dumps(PROCESSOR, indent=2)
    (folder / "processor" / "preprocessor_config.json").write_text(config)
    return model
