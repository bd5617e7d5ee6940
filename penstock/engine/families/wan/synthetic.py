"""Models of true shapes, or of tiny ones, that `penstock bench` makes on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from penstock.engine.bench.synthetic import Synthetic
from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.families.wan.tiny import write_tiny_model

_WAN_14B: Mapping[str, Any] = MappingProxyType(
    {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
)
_TINY: Mapping[str, Any] = MappingProxyType(
    dict(_WAN_14B)
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 6,
        "image_dim": 64,
        "added_kv_proj_dim": 128,
    }
)


@dataclass(frozen=True)
class _Wan(Synthetic):
    """A model of Wan.

    Attributes:
        vae: config entries of a VAE of true shapes.
        image: of the image encoder, cut to two layers.
    """

    vae: Mapping[str, Any]
    image: Mapping[str, Any]

    def write_rest(self, folder: Path, seed: int) -> None:
        """As `Synthetic.write_rest`: the VAE has its true shapes; the encoders are cut to a few
        thin layers, their outputs as wide as the true ones'."""
        config = self.streamed
        text = {"d_model": config["text_dim"], "d_kv": 16, "num_heads": 4, "num_layers": 2}
        small: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 64}
        write_tiny_model(
            folder,
            seed=seed,
            dtype=torch.bfloat16,
            vae=dict(self.vae),
            text=text,
            image=small | dict(self.image),
        )


SYNTHETIC: Mapping[str, Synthetic] = MappingProxyType(
    {
        "wan2.1-i2v-14b": _Wan(
            KINDS["transformer"],
            _WAN_14B,
            {"base_dim": 96, "num_res_blocks": 2},
            {"hidden_size": 1280, "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
        ),
        "tiny": _Wan(KINDS["transformer"], _TINY, {"base_dim": 8}, {"hidden_size": 64}),
    }
)
