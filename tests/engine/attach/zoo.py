"""Tiny networks of other people's architectures: module, lists of blocks, a call, its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.versions import TRANSFORMERS_4


@dataclass(frozen=True)
class Case:
    module: nn.Module
    blocks: str | tuple[str, ...]
    call: Callable[[], Tensor]


def _t5() -> Case:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=64, d_ff=256, d_kv=16, num_layers=8, num_heads=4, vocab_size=96)
    module: Any = T5EncoderModel(config).eval()
    ids = torch.randint(0, 96, (2, 9))
    return Case(module, "encoder.block", lambda: module(ids).last_hidden_state)


def _bert() -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=4,
                        intermediate_size=256, vocab_size=96)  # fmt: skip
    module: Any = BertModel(config).eval()
    ids = torch.randint(0, 96, (2, 9))
    return Case(module, "encoder.layer", lambda: module(ids).last_hidden_state)


def _dinov2() -> Case:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, mlp_ratio=4,
                          image_size=28, patch_size=14)  # fmt: skip
    module: Any = Dinov2Model(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    return Case(module, "encoder.layer", lambda: module(pixels).last_hidden_state)


def _clip() -> Case:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=4,
                              intermediate_size=256, image_size=28, patch_size=14)  # fmt: skip
    module: Any = CLIPVisionModel(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    return Case(
        module,
        "vision_model.encoder.layers" if TRANSFORMERS_4 else "encoder.layers",
        lambda: module(pixels, output_hidden_states=True).hidden_states[-2],
    )


def _flux() -> Case:
    from diffusers import FluxTransformer2DModel

    module: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=5, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
    }
    return Case(
        module,
        ("transformer_blocks", "single_transformer_blocks"),
        lambda: module(**inputs).sample,
    )


def _cogvideox() -> Case:
    from diffusers import CogVideoXTransformer3DModel

    module: Any = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=8, sample_width=8, sample_height=8,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
    ).eval()  # fmt: skip
    latents, text = torch.randn(1, 2, 4, 8, 8), torch.randn(1, 6, 16)
    return Case(
        module,
        "transformer_blocks",
        lambda: module(latents, text, torch.tensor([3])).sample,
    )


_MAKERS = {
    "t5": _t5,
    "bert": _bert,
    "dinov2": _dinov2,
    "clip": _clip,
    "flux": _flux,
    "cogvideox": _cogvideox,
}
NAMES = tuple(_MAKERS)


def make(name: str, seed: int = 0) -> Case:
    """One of them, its weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MAKERS[name]()


class Walk(nn.Module):
    """Blocks of different sizes that are reached in an order of one's own."""

    def __init__(self, order: Callable[[Any], Any] = lambda blocks: blocks) -> None:
        super().__init__()
        self.order = order
        sizes = [24, 40, 56, 32, 48, 24]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, size), nn.GELU(), nn.Linear(size, 16)) for size in sizes
            )
            self.register_buffer("offset", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offset
        for block in self.order(self.blocks):
            x = x + block(x)
        return x
