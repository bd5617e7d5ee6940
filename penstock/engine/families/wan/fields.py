"""Every value of the configs of Wan's networks: what it may be.

The ranges leave room for models several times as large as any that exists, and keep what is counted
by them (layers, widths, steps) from taking time or memory before a tensor is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.families.wan.config import IMAGE, TEXT, TRANSFORMER, VAE, check_transformer
from penstock.engine.files.fields import (
    Field,
    check_fields,
    flag,
    maybe,
    number,
    several,
    text,
    whole,
)
from penstock.errors import CheckpointError

_LAYERS = whole(1, 256)
_WIDTH = whole(1, 1 << 20)
_HEADS = whole(1, 4096)
_CHANNELS = whole(1, 4096)
_SIDE = whole(1, 4096)
_EPSILON = number(0, 1)
_SHARE = number(0, 1)
_REAL = number(-1e6, 1e6)

_TRANSFORMER = {
    "num_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "attention_head_dim": Field(
        "an even number from 2 to 4,096",
        lambda value: type(value) is int and 2 <= value <= 4096 and value % 2 == 0,
    ),
    "ffn_dim": _WIDTH,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "text_dim": _WIDTH,
    "freq_dim": whole(2, 1 << 16),
    "image_dim": maybe(_WIDTH),
    "added_kv_proj_dim": maybe(_WIDTH),
    "patch_size": several(whole(1, 64), 3, 3),
    "rope_max_seq_len": whole(1, 1 << 16),
    "pos_embed_seq_len": maybe(whole(1, 1 << 16)),
    "cross_attn_norm": flag(),
    "qk_norm": text("rms_norm_across_heads"),
    "eps": _EPSILON,
}
_TEXT = {
    "vocab_size": whole(1, 1 << 24),
    "d_model": _WIDTH,
    "d_kv": whole(1, 4096),
    "d_ff": _WIDTH,
    "num_layers": _LAYERS,
    "num_decoder_layers": maybe(whole(0, 256)),
    "num_heads": _HEADS,
    "relative_attention_num_buckets": whole(4, 1 << 16),
    "relative_attention_max_distance": whole(1, 1 << 20),
    "layer_norm_epsilon": _EPSILON,
    "dropout_rate": _SHARE,
    "classifier_dropout": _SHARE,
    "initializer_factor": _REAL,
    "feed_forward_proj": text("gated-gelu", "gated-silu", "gated-relu"),
    "model_type": text(),
}
_IMAGE = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": whole(2, 256),
    "num_attention_heads": _HEADS,
    "num_channels": _CHANNELS,
    "image_size": _SIDE,
    "patch_size": whole(1, 1024),
    "projection_dim": _WIDTH,
    "hidden_act": text("gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "layer_norm_eps": _EPSILON,
    "attention_dropout": _SHARE,
    "model_type": text(),
}
_VAE = {
    "base_dim": whole(1, 1 << 14),
    "decoder_base_dim": maybe(whole(1, 1 << 14)),
    "z_dim": _CHANNELS,
    "dim_mult": several(whole(1, 64), 1, 8),
    "num_res_blocks": whole(1, 64),
    "temperal_downsample": several(flag(), 1, 8),
    "latents_mean": several(_REAL, 1, 4096),
    "latents_std": several(number(1e-6, 1e6), 1, 4096),
    "attn_scales": several(_REAL, 0, 16),
    "dropout": _SHARE,
    "is_residual": flag(),
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "patch_size": maybe(whole(1, 64)),
    "scale_factor_temporal": whole(1, 64),
    "scale_factor_spatial": whole(1, 256),
}
_DEFAULTS_OF = {
    "transformer": TRANSFORMER, "text_encoder": TEXT, "image_encoder": IMAGE, "vae": VAE,
}  # fmt: skip
COMPONENTS: Mapping[str, Mapping[str, Field]] = MappingProxyType(
    {
        "transformer": _TRANSFORMER,
        "text_encoder": _TEXT,
        "image_encoder": _IMAGE,
        "vae": _VAE,
        "transformer_2": _TRANSFORMER,
    }
)
"""Of the configs of the networks, by component."""


def check_config(component: str, where: str, config: Mapping[str, Any]) -> None:
    """Refuse a network's config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    check_fields(config, COMPONENTS[component], where)
    if component == "transformer":
        check_transformer(where, {**TRANSFORMER, **config})
    for needed, told in _relations(component, {**_DEFAULTS_OF[component], **config}):
        if not needed:
            raise CheckpointError(
                f"{where} cannot be used",
                expected=told,
                found="other values",
                remedy="The config is damaged, or of another model: copy it again",
            )


def _relations(component: str, config: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield what must hold between the entries of a config, beside their ranges."""
    if component == "image_encoder":
        heads, width = config["num_attention_heads"], config["hidden_size"]
        yield width % heads == 0, f"hidden_size {width} as a multiple of {heads} heads"
        yield config["image_size"] >= config["patch_size"], "an image_size of one patch or more"
    if component == "text_encoder":
        buckets = config.get("relative_attention_num_buckets", 32)
        reach = config.get("relative_attention_max_distance", 128)
        yield 4 * reach > buckets, "a relative_attention_max_distance that its buckets can tell"
    if component == "vae":
        stages, changes = len(config["dim_mult"]), len(config["temperal_downsample"])
        yield changes == stages - 1, f"{stages - 1} entries of temperal_downsample"
        for name in ("latents_mean", "latents_std"):
            channels = len(config.get(name, range(16)))
            yield channels == config["z_dim"], f"{config['z_dim']} entries of {name}"


def known(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``config`` that are checked: what a network's class is made with."""
    return {name: value for name, value in config.items() if name in COMPONENTS[component]}
