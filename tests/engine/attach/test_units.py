"""The blocks of an unknown network are found by what it holds, not by what it says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from penstock.engine.attach.units import LARGE_SHARE, find_units


def _lists(make: Callable[[], Any]) -> tuple[Counter[str], float, float]:
    """Blocks by list; the share of the weights in them; that of the largest."""
    with torch.device("meta"):
        network = make()
    units = find_units(network)
    total = sum(p.nbytes for p in network.parameters())
    sizes = [sum(p.nbytes for p in unit.module.parameters()) for unit in units]
    assert all(network.get_submodule(unit.name) is unit.module for unit in units)
    return Counter(unit.list_name for unit in units), sum(sizes) / total, max(sizes) / total


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FluxTransformer2DModel", {"transformer_blocks": 19, "single_transformer_blocks": 38}),
        (
            "HunyuanVideo15Transformer3DModel",  # names its patch embedding as a block
            {"context_embedder.token_refiner.refiner_blocks": 2, "transformer_blocks": 54},
        ),
        (
            "MiniMaxH3Transformer3DModel",
            {"token_refiner.refiner_blocks": 2, "transformer_blocks": 50},
        ),
    ],
)
def test_true_transformers(name: str, wanted: dict[str, int]) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    found, share, largest = _lists(getattr(diffusers, name))
    assert found == wanted
    assert share > 0.9 and largest < 0.06


def test_the_stages_of_a_unet_are_taken_apart() -> None:
    sdxl = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    }  # fmt: skip
    found, share, largest = _lists(lambda: diffusers.UNet2DConditionModel(**sdxl))
    assert found["down_blocks.2.attentions.0.transformer_blocks"] == 10
    assert share > 0.9 and largest < LARGE_SHARE / 2


def test_what_is_no_list_of_blocks_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Linear(64, 512)
            self.small = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.others = nn.ModuleList([nn.Linear(64, 64), nn.Conv1d(64, 64, 1), nn.Dropout()])
            self.lone = nn.ModuleList([nn.Linear(64, 64)])
            self.holes = nn.ModuleList([nn.Linear(64, 64)])
            self.holes.add_module("1", None)  # as in Mochi's VAE

    assert find_units(Odd()) == ()
