"""Names and shapes of all tensors of a Wan2.1 model, in closed form from its configs.

The names are those of diffusers (transformer, VAE) and transformers (UMT5, CLIP); tests hold them
equal to the classes of those libraries. Free of torch: a file is described without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Shapes: TypeAlias = dict[str, tuple[int, ...]]
Config: TypeAlias = Mapping[str, Any]

CROSS_KV_NAMES = (
    "attn2.to_k",
    "attn2.to_v",
    "attn2.norm_k",
    "attn2.add_k_proj",
    "attn2.add_v_proj",
    "attn2.norm_added_k",
)
"""Modules of a block that only `penstock.engine.families.wan.forward.cross_kv` uses:
`block_forward` runs without their weights."""


def is_cross_kv(local_name: str) -> bool:
    """Return whether a block's tensor belongs to `CROSS_KV_NAMES`, by its name inside the block."""
    return local_name.startswith(tuple(f"{name}." for name in CROSS_KV_NAMES))


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def transformer_shapes(config: Config) -> Shapes:
    """Return the shapes of `diffusers.WanTransformer3DModel`."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patch = tuple(config["patch_size"])
    shapes: Shapes = {"scale_shift_table": (1, 2, dim)}
    shapes |= {"patch_embedding.weight": (dim, config["in_channels"], *patch)}
    shapes |= {"patch_embedding.bias": (dim,)}
    shapes |= _prefixed("condition_embedder.", _condition_shapes(config, dim))
    block = _transformer_block(config, dim)
    for index in range(config["num_layers"]):
        shapes |= _prefixed(f"blocks.{index}.", block)
    volume = patch[0] * patch[1] * patch[2]
    return shapes | _linear("proj_out", config["out_channels"] * volume, dim)


def _condition_shapes(config: Config, dim: int) -> Shapes:
    shapes = _linear("time_embedder.linear_1", dim, config["freq_dim"])
    shapes |= _linear("time_embedder.linear_2", dim, dim)
    shapes |= _linear("time_proj", 6 * dim, dim)
    shapes |= _linear("text_embedder.linear_1", dim, config["text_dim"])
    shapes |= _linear("text_embedder.linear_2", dim, dim)
    width = config.get("image_dim")
    if width is None:
        return shapes
    places = config.get("pos_embed_seq_len")
    if places is not None:
        shapes |= {"image_embedder.pos_embed": (1, places, width)}
    shapes |= _norm("image_embedder.norm1", width)
    shapes |= _linear("image_embedder.ff.net.0.proj", width, width)
    shapes |= _linear("image_embedder.ff.net.2", dim, width)
    return shapes | _norm("image_embedder.norm2", dim)


def _transformer_block(config: Config, dim: int) -> Shapes:
    shapes: Shapes = {"scale_shift_table": (1, 6, dim)}
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{attention}.{name}", dim, dim)
        shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
    added = config.get("added_kv_proj_dim")
    if added is not None:
        shapes |= _linear("attn2.add_k_proj", dim, added) | _linear("attn2.add_v_proj", dim, added)
        shapes |= {"attn2.norm_added_k.weight": (dim,)}
    if config["cross_attn_norm"]:
        shapes |= _norm("norm2", dim)
    shapes |= _linear("ffn.net.0.proj", config["ffn_dim"], dim)
    return shapes | _linear("ffn.net.2", dim, config["ffn_dim"])


def text_shapes(config: Config) -> Shapes:
    """Return the shapes of `transformers.UMT5EncoderModel`, without the tied copy of the
    embedding."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    attention, feed = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    block: Shapes = {}
    for name in "qkv":
        block |= _linear(attention + name, inner, width, bias=False)
    block |= _linear(attention + "o", width, inner, bias=False)
    buckets = config["relative_attention_num_buckets"]
    block |= {attention + "relative_attention_bias.weight": (buckets, config["num_heads"])}
    block |= {"layer.0.layer_norm.weight": (width,), "layer.1.layer_norm.weight": (width,)}
    for name in ("wi_0", "wi_1"):
        block |= _linear(feed + name, config["d_ff"], width, bias=False)
    block |= _linear(feed + "wo", width, config["d_ff"], bias=False)
    shapes: Shapes = {"shared.weight": (config["vocab_size"], width)}
    for index in range(config["num_layers"]):
        shapes |= _prefixed(f"encoder.block.{index}.", block)
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


def image_shapes(config: Config) -> Shapes:
    """Return the shapes of `transformers.CLIPVisionModel`."""
    width, patch = config["hidden_size"], config["patch_size"]
    places = (config["image_size"] // patch) ** 2 + 1
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": (places, width),
    }
    shapes |= _norm("pre_layrnorm", width)
    block: Shapes = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= _linear(f"self_attn.{name}", width, width)
    block |= _norm("layer_norm1", width) | _norm("layer_norm2", width)
    block |= _linear("mlp.fc1", config["intermediate_size"], width)
    block |= _linear("mlp.fc2", width, config["intermediate_size"])
    for index in range(config["num_hidden_layers"]):
        shapes |= _prefixed(f"encoder.layers.{index}.", block)
    return shapes | _norm("post_layernorm", width)


def layers_needed(num_hidden_layers: int) -> int:
    """Return the layers of the image encoder that run: the model is conditioned on
    ``hidden_states[-2]``, so the last one is never computed."""
    return num_hidden_layers - 1


def vae_shapes(config: Config) -> Shapes:
    """Return the shapes of `diffusers.AutoencoderKLWan` of Wan2.1 and of Wan2.2 TI2V."""
    latent = config["z_dim"]
    shapes = _prefixed("encoder.", _encoder_shapes(config))
    shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1, 1, 1)
    shapes |= _conv("post_quant_conv", latent, latent, 1, 1, 1)
    return shapes | _prefixed("decoder.", _decoder_shapes(config))


def _conv(name: str, out: int, into: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}


def _resnet(name: str, into: int, out: int) -> Shapes:
    shapes: Shapes = {f"{name}.norm1.gamma": (into, 1, 1, 1)}
    shapes |= _conv(f"{name}.conv1", out, into, 3, 3, 3)
    shapes |= {f"{name}.norm2.gamma": (out, 1, 1, 1)}
    shapes |= _conv(f"{name}.conv2", out, out, 3, 3, 3)
    return shapes if into == out else shapes | _conv(f"{name}.conv_shortcut", out, into, 1, 1, 1)


def _middle(width: int) -> Shapes:
    name = "mid_block.attentions.0"
    shapes: Shapes = {f"{name}.norm.gamma": (width, 1, 1)}
    shapes |= _conv(f"{name}.to_qkv", 3 * width, width, 1, 1)
    shapes |= _conv(f"{name}.proj", width, width, 1, 1)
    for index in (0, 1):
        shapes |= _resnet(f"mid_block.resnets.{index}", width, width)
    return shapes


def _encoder_shapes(config: Config) -> Shapes:
    widths = [config["base_dim"] * factor for factor in config["dim_mult"]]
    into, residual = config["base_dim"], config.get("is_residual")
    shapes = _conv("conv_in", into, config.get("in_channels", 3), 3, 3, 3)
    place = 0
    for stage, width in enumerate(widths):
        for index in range(config["num_res_blocks"]):
            name = f"{stage}.resnets.{index}" if residual else f"{place}"
            shapes |= _resnet(f"down_blocks.{name}", into, width)
            into, place = width, place + 1
        if stage + 1 < len(widths):
            name = f"down_blocks.{stage}.downsampler" if residual else f"down_blocks.{place}"
            shapes |= _conv(f"{name}.resample.1", width, width, 3, 3)
            if config["temperal_downsample"][stage]:
                shapes |= _conv(f"{name}.time_conv", width, width, 3, 1, 1)
            place += 1
    shapes |= _middle(into) | {"norm_out.gamma": (into, 1, 1, 1)}
    return shapes | _conv("conv_out", 2 * config["z_dim"], into, 3, 3, 3)


def _decoder_shapes(config: Config) -> Shapes:
    residual = config.get("is_residual")
    base = config.get("decoder_base_dim") or config["base_dim"]
    widths = [base * factor for factor in reversed(config["dim_mult"])]
    into = widths[0]
    shapes = _conv("conv_in", into, config["z_dim"], 3, 3, 3) | _middle(into)
    upsample = list(reversed(config["temperal_downsample"]))
    for stage, width in enumerate(widths):
        for index in range(config["num_res_blocks"] + 1):
            shapes |= _resnet(f"up_blocks.{stage}.resnets.{index}", into, width)
            into = width
        if stage + 1 < len(widths):
            name = f"up_blocks.{stage}." + ("upsampler" if residual else "upsamplers.0")
            into = width if residual else width // 2
            shapes |= _conv(f"{name}.resample.1", into, width, 3, 3)
            if upsample[stage]:
                shapes |= _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
    shapes |= {"norm_out.gamma": (into, 1, 1, 1)}
    return shapes | _conv("conv_out", config.get("out_channels", 3), into, 3, 3, 3)
