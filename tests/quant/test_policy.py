"""Which weights are quantised, against the names of a real model's structure."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import WanTransformer3DModel

from penstock.quant.policy import default_policy


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=12,
            ffn_dim=160,
            text_dim=32,
            image_dim=24,
            added_kv_proj_dim=48,
            in_channels=36,
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_attention_and_feed_forward_matrices_and_nothing_else(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    chosen = set(default_policy(shapes))
    local = {name.split(".", 2)[2] for name in chosen}
    assert local == {
        *(f"attn1.{each}.weight" for each in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{each}.weight" for each in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{each}.weight" for each in ("add_k_proj", "add_v_proj")),
        "ffn.net.0.proj.weight",
        "ffn.net.2.weight",
    }
    assert len(chosen) == 3 * len(local)
    rest = set(shapes) - chosen
    assert all(not n.startswith("blocks.") or math.prod(shapes[n]) <= 6 * 160 for n in rest)
    assert any(n.startswith("condition_embedder.") and len(shapes[n]) == 2 for n in rest)
