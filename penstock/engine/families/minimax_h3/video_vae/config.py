"""The config of `AutoencoderKLMiniMaxH3`: its entries, their ranges, and what shapes tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.family.naming import ShapesOf
from penstock.engine.files.fields import Field, check_fields, flag, number, several, text, whole
from penstock.errors import CheckpointError

_MEAN = (
    0.858090341091156, -0.9606591463088989, 1.0661640167236328, -0.5090325474739075,
    -0.2727581858634949, -1.3675414323806763, -0.2553254961967468, -0.26907554268836975,
    -0.5376840829849243, -0.0464097298681736, 0.6657370328903198, 0.19690127670764923,
    -0.5460608005523682, -0.4035342037677765, -0.23683024942874908, 0.25928452610969543,
    -0.30133944749832153, 0.211341992020607, -1.1206848621368408, 0.3581933379173279,
    -0.04225143790245056, 0.2604829967021942, 0.22864092886447906, 0.7056031823158264,
)  # fmt: skip
_STD = (
    1.2223774194717407, 1.2767263650894165, 1.68317747116088865, 1.7549455165863037,
    1.5636216402053833, 2.194143533706665, 0.96531379222869875, 1.05698859691619875,
    0.841948926448822, 0.7729952931404114, 1.8955937623977661, 0.946841835975647,
    0.7996809482574463, 0.44988900423049925, 0.7197399735450745, 0.69362932443618775,
    2.961095094680786, 2.7694199085235595, 3.0496184825897215, 2.1088054180145265,
    3.276226282119751, 3.1627357006073, 2.28168129920959475, 2.6127843856811525,
)  # fmt: skip

VAE: Mapping[str, Any] = MappingProxyType({
    "in_channels": 3, "out_channels": 3, "latent_channels": 24,
    "block_out_channels": (128, 256, 256, 512, 512, 1024), "layers_per_block": 2,
    "spatial_downsample_factors": (2, 2, 2, 2, 1, 1),
    "temporal_downsample_factors": (1, 2, 2, 1, 1, 1), "norm_num_groups": 32, "norm_eps": 1e-6,
    "spatial_padding_mode": "reflect", "decoder_num_layers": 36,
    "decoder_num_attention_heads": 32, "decoder_attention_head_dim": 64,
    "decoder_num_register_tokens": 4, "decoder_ffn_mult": 4, "decoder_rope_theta": 100.0,
    "decoder_rope_dim_ratio": 0.75, "decoder_norm_eps": 1e-5, "clip_length": 17, "token_drop": 3,
    "latents_mean": (0.0,) * 24, "latents_std": (1.0,) * 24, "fused": False,
})  # fmt: skip
"""Defaults of diffusers' class. ``fused`` is ours: queries, keys and values lie in one matrix, head
by head, and a gate before what it opens, as in the makers' own files."""

_FACTORS = several(whole(1, 4), 1, 16)
_FIELDS: Mapping[str, Field] = MappingProxyType({
    "in_channels": whole(3, 3), "out_channels": whole(3, 3), "latent_channels": whole(1, 4096),
    "block_out_channels": several(whole(1, 1 << 14), 1, 16), "layers_per_block": whole(1, 64),
    "spatial_downsample_factors": _FACTORS, "temporal_downsample_factors": _FACTORS,
    "norm_num_groups": whole(1, 4096), "norm_eps": number(0, 1),
    "spatial_padding_mode": text("reflect", "replicate"), "decoder_num_layers": whole(1, 256),
    "decoder_num_attention_heads": whole(1, 4096), "decoder_attention_head_dim": whole(2, 4096),
    "decoder_num_register_tokens": whole(1, 4096), "decoder_ffn_mult": whole(1, 64),
    "decoder_rope_theta": number(1, 1e12), "decoder_rope_dim_ratio": number(0, 1),
    "decoder_norm_eps": number(0, 1), "clip_length": whole(1, 4096), "token_drop": whole(1, 4096),
    "latents_mean": several(number(-1e6, 1e6), 1, 4096),
    "latents_std": several(number(1e-6, 1e6), 1, 4096), "fused": flag(),
})  # fmt: skip


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    check_fields(config, _FIELDS, where)
    known = {**VAE, **config}
    levels = len(known["block_out_channels"])
    chunk = math.ceil(known["clip_length"] / math.prod(known["temporal_downsample_factors"]))
    needs = [
        (len(known[f"{name}_downsample_factors"]) == levels, f"{levels} {name} factors")
        for name in ("spatial", "temporal")
    ]
    needs += [
        (
            len(known[name]) == known["latent_channels"],
            f"{known['latent_channels']} entries of {name}",
        )
        for name in ("latents_mean", "latents_std")
    ]
    needs += [
        (
            all(width % known["norm_num_groups"] == 0 for width in known["block_out_channels"]),
            f"channels in {known['norm_num_groups']} groups",
        ),
        (rope_width(known) % 6 == 0, "turned channels of a head that 6 divides"),
        (known["token_drop"] < chunk, f"a token_drop below {chunk}"),
    ]
    for fits, told in needs:
        if not fits:
            raise CheckpointError(
                f"{where} is not a video VAE of MiniMax-H3",
                expected=told,
                found="other values",
                remedy="The config is damaged, or of another model: copy it again",
            )


def rope_width(config: Mapping[str, Any]) -> int:
    """Return the channels of a head that are turned by place."""
    return int(config["decoder_attention_head_dim"] * config["decoder_rope_dim_ratio"])


def derive(shapes: ShapesOf) -> dict[str, Any]:
    """Return the config that shapes tell; mean and deviation are the published ones."""
    width, latent = shapes.of("decoder.proj_in.weight", 2)
    if latent != len(_MEAN):
        raise CheckpointError(
            f"{shapes.where} is not a video VAE of MiniMax-H3",
            expected=f"{len(_MEAN)} latent channels",
            found=str(latent),
            remedy="Put the model's config.json beside the file.",
        )
    widths = [
        shapes.of(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 5)[0]
        for level in range(shapes.count("encoder.down_blocks."))
    ]
    fused = "decoder.transformer_blocks.0.attn.to_qkv.weight" in shapes
    inner = shapes.of("decoder.transformer_blocks.0.ff.net.2.weight", 2)[1]
    return {
        "latent_channels": latent,
        "block_out_channels": widths,
        "layers_per_block": shapes.count("encoder.down_blocks.0.resnets."),
        "decoder_num_layers": shapes.count("decoder.transformer_blocks."),
        "decoder_num_attention_heads": width // VAE["decoder_attention_head_dim"],
        "decoder_num_register_tokens": shapes.of("decoder.register_tokens", 3)[1],
        "decoder_ffn_mult": inner // width,
        "latents_mean": list(_MEAN),
        "latents_std": list(_STD),
        "fused": fused,
    }


def title(config: Mapping[str, Any]) -> str:
    """Return the VAE's name for people."""
    width = config["decoder_num_attention_heads"] * config["decoder_attention_head_dim"]
    return "MiniMax-H3 VAE" if width == 2048 else f"MiniMax-H3 VAE ({width} wide)"
