"""Every value of every config of a Wan model: what it may be.

The ranges leave room for models several times as large as any that exists, and keep what is counted
by them (layers, widths, steps) from taking time or memory before a tensor is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.families.wan.config import IMAGE, TEXT, TRANSFORMER, VAE
from penstock.engine.files.fields import (
    Field,
    check_fields,
    either,
    flag,
    maybe,
    number,
    several,
    table,
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
    {"transformer": _TRANSFORMER, "text_encoder": _TEXT, "image_encoder": _IMAGE, "vae": _VAE}
)
"""Of the configs of the networks, by component."""

_ENDLESS = either(_REAL, Field("infinite", lambda value: value in (float("inf"), -float("inf"))))
SCHEDULER: Mapping[str, Field] = MappingProxyType({
    "num_train_timesteps": whole(1, 100_000),
    "beta_start": _SHARE,
    "beta_end": _SHARE,
    "beta_schedule": text("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "trained_betas": maybe(several(_SHARE, 1, 4096)),
    "solver_order": whole(1, 3),
    "prediction_type": text(),
    "thresholding": flag(),
    "dynamic_thresholding_ratio": _SHARE,
    "sample_max_value": _REAL,
    "predict_x0": flag(),
    "algorithm_type": text(),
    "solver_type": text(),
    "lower_order_final": flag(),
    "euler_at_final": flag(),
    "disable_corrector": several(whole(0, 100_000), 0, 4096),
    "lambda_min_clipped": _ENDLESS,
    "use_karras_sigmas": maybe(flag()),
    "use_exponential_sigmas": maybe(flag()),
    "use_beta_sigmas": maybe(flag()),
    "use_lu_lambdas": maybe(flag()),
    "use_flow_sigmas": maybe(flag()),
    "use_dynamic_shifting": flag(),
    "flow_shift": maybe(number(1e-6, 1e6)),
    "shift": number(1e-6, 1e6),
    "shift_terminal": maybe(_REAL),
    "base_shift": maybe(_REAL),
    "max_shift": maybe(_REAL),
    "base_image_seq_len": maybe(whole(1, 1 << 24)),
    "max_image_seq_len": maybe(whole(1, 1 << 24)),
    "timestep_spacing": text("linspace", "leading", "trailing"),
    "steps_offset": whole(0, 100_000),
    "final_sigmas_type": maybe(text("zero", "sigma_min")),
    "rescale_betas_zero_snr": flag(),
    "invert_sigmas": flag(),
    "stochastic_sampling": flag(),
    "variance_type": maybe(text()),
})  # fmt: skip
"""Of a scheduler_config.json: the entries of the solvers that penstock sets up."""

_SIZE = either(
    whole(1, 4096),
    table({name: whole(1, 4096) for name in ("shortest_edge", "longest_edge", "height", "width")}),
)
_THREE = several(_REAL, 3, 3)
IMAGE_PROCESSOR: Mapping[str, Field] = MappingProxyType({
    "size": _SIZE,
    "crop_size": maybe(_SIZE),
    "image_mean": _THREE,
    "image_std": several(number(1e-6, 1e6), 3, 3),
    "resample": whole(0, 5),
    "rescale_factor": number(1e-9, 1e6),
    "do_resize": flag(),
    "do_center_crop": flag(),
    "do_rescale": flag(),
    "do_normalize": flag(),
    "do_convert_rgb": maybe(flag()),
})  # fmt: skip
"""Of a preprocessor_config.json."""


DEFAULTS: Mapping[str, Field] = MappingProxyType({
    "width": whole(1, 1 << 16),
    "height": whole(1, 1 << 16),
    "frames": whole(1, 1 << 16),
    "steps": whole(1, 1000),
    "fps": whole(1, 240),
    "guidance_scale": number(0, 1000),
    "shift": number(1e-6, 1000),
    "negative_prompt": text(),
})  # fmt: skip
"""Of a model's defaults.json; a request checks them more narrowly."""

MODEL_INDEX: Mapping[str, Field] = MappingProxyType({
    "_class_name": text(),
    "transformer_2": maybe(several(maybe(text()), 2, 2)),
    "expand_timesteps": maybe(flag()),
})  # fmt: skip
"""Of a model_index.json: what tells one pipeline from another."""


def check_config(component: str, config: Mapping[str, Any], where: str) -> None:
    """Refuse a network's config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    check_fields(config, COMPONENTS[component], where)
    for needed, told in _relations(component, {**_DEFAULTS_OF[component], **config}):
        if not needed:
            raise CheckpointError(
                f"{where} cannot be used",
                expected=told,
                found="other values",
                remedy="The config is damaged, or of another model: copy it again",
            )


def _relations(component: str, config: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """What must hold between the entries of a config, beside their ranges."""
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
    """The entries of ``config`` that are checked: what a network's class is made with."""
    return {name: value for name, value in config.items() if name in COMPONENTS[component]}
