"""A component's config from the shapes of its tensors, for files that come without config.json.

What shapes do not tell (head widths, epsilons, activations) is the same in all official models.
Sources: Wan2.1's ``wan/configs`` and model classes, the configs of the diffusers repositories,
open_clip's ViT-H/14.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from penstock.engine.families.wan.strangers import by_channels
from penstock.engine.family.naming import ShapesOf
from penstock.engine.files.keys import not_run
from penstock.errors import CheckpointError

HEAD_DIM = 128
"""Width of an attention head in every Wan2.1 transformer."""

CLIP_HEAD_DIM = 80
"""Width of an attention head of ViT-H/14."""

SIZES: Mapping[tuple[int, int, int], str] = MappingProxyType(
    {(5120, 40, 13824): "14B", (1536, 30, 8960): "1.3B", (3072, 30, 14336): "5B"}
)
"""Width, layers and feed-forward width of the official transformers. Source: ``wan/configs``."""

UNIPC: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "flow_shift": 5.0,
    }
)
"""The official sampler at 720p (Wan2.1's ``generate.py``); a request's shift replaces this one."""

IMAGE_PROCESSOR: Mapping[str, Any] = MappingProxyType(
    {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": MappingProxyType({"height": 224, "width": 224}),
        "size": MappingProxyType({"shortest_edge": 224}),
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
)
"""OpenAI CLIP's preprocessing, which the image encoder was trained with."""


TRANSFORMER: Mapping[str, Any] = MappingProxyType({
    "num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824,
    "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "image_dim": None,
    "patch_size": (1, 2, 2), "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
})  # fmt: skip
TEXT: Mapping[str, Any] = MappingProxyType({
    "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
})  # fmt: skip
IMAGE: Mapping[str, Any] = MappingProxyType({
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
})  # fmt: skip
VAE: Mapping[str, Any] = MappingProxyType({
    "base_dim": 96, "z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2,
    "temperal_downsample": (False, True, True), "is_residual": False, "decoder_base_dim": None,
    "patch_size": None, "in_channels": 3, "out_channels": 3,
})  # fmt: skip
"""Defaults of WanTransformer3DModel, UMT5Config, CLIPVisionConfig and AutoencoderKLWan, for what a
config.json leaves out: so much as a plan needs (a test compares them)."""


MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
"""Of the latents of Wan2.2's VAE. Source: Wan2.2's ``wan/modules/vae2_2.py``."""


def derive_transformer(shapes: ShapesOf) -> dict[str, Any]:
    dim, channels, *patch = shapes.of("patch_embedding.weight", 5)
    heads = _heads(shapes, dim, HEAD_DIM)
    rows, _ = shapes.of("proj_out.weight", 2)
    embedder = "condition_embedder."
    image_norm = embedder + "image_embedder.norm1.weight"
    image_dim = shapes.of(image_norm, 1)[0] if image_norm in shapes else None
    added = "blocks.0.attn2.add_k_proj.weight"
    places = embedder + "image_embedder.pos_embed"
    config = {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": rows // math.prod(patch),
        "text_dim": shapes.of(embedder + "text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes.of(embedder + "time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shapes.of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shapes.count("blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image_dim,
        "added_kv_proj_dim": shapes.of(added, 2)[1] if added in shapes else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": shapes.of(places, 3)[1] if places in shapes else None,
    }
    check_transformer(shapes.where, config)
    return config


def check_transformer(where: str, config: Mapping[str, Any]) -> None:
    """Refuse what is built like Wan's models that are run and is none.

    Raises:
        CheckpointError: other channels; NotRun: those of a model that is known by name.
    """
    name = by_channels(config["in_channels"], config["out_channels"])
    if name is not None:
        raise not_run(where, name)
    if (config["in_channels"], config["out_channels"]) not in ((16, 16), (36, 16), (48, 48)):
        raise CheckpointError(
            f"{where} is not a transformer of Wan that penstock runs",
            expected="16 input channels (T2V) or 36 (I2V), and 16 that it gives; or 48 and 48 (5B)",
            found=f"{config['in_channels']} and {config['out_channels']}",
            remedy="Fun and VACE models of Wan2.1 and Wan2.2 are not supported.",
        )


def _heads(shapes: ShapesOf, width: int, head_dim: int) -> int:
    if width % head_dim:
        raise CheckpointError(
            f"{shapes.where} is of an unknown size",
            expected=f"a width that is a multiple of the head width {head_dim}",
            found=str(width),
            remedy="Put the model's config.json beside the file.",
        )
    return width // head_dim


def derive_text(shapes: ShapesOf) -> dict[str, Any]:
    vocabulary, width = shapes.of("shared.weight", 2)
    block = "encoder.block.0.layer."
    buckets, heads = shapes.of(f"{block}0.SelfAttention.relative_attention_bias.weight", 2)
    inner, _ = shapes.of(f"{block}0.SelfAttention.q.weight", 2)
    return {
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes.of(f"{block}1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": shapes.count("encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


def derive_image(shapes: ShapesOf) -> dict[str, Any]:
    width, channels, patch, _ = shapes.of("embeddings.patch_embedding.weight", 4)
    places, _ = shapes.of("embeddings.position_embedding.weight", 2)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes.of("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.count("encoder.layers."),
        "num_attention_heads": _heads(shapes, width, CLIP_HEAD_DIM),
        "num_channels": channels,
        "image_size": math.isqrt(places - 1) * patch,
        "patch_size": patch,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _res_blocks(shapes: ShapesOf) -> int:
    """Count the residual blocks of a stage of the encoder; the decoder's have one more. Two, where
    no more can be told."""
    names = (f"decoder.up_blocks.0.resnets.{number}.conv1.weight" for number in range(9))
    count = sum(1 for _ in takewhile(shapes.__contains__, names))
    return count - 1 if count > 1 else 2


def derive_vae(shapes: ShapesOf) -> dict[str, Any]:
    base = shapes.of("encoder.conv_in.weight", 5)[0]
    latent = shapes.of("post_quant_conv.weight", 5)[0]
    if latent == 48:
        return _derive_residual_vae(shapes, base)
    if latent != 16:
        raise CheckpointError(
            f"{shapes.where} is not a VAE of Wan2.1 or Wan2.2",
            expected="16 latent channels, or 48",
            found=str(latent),
            remedy="Give the model's own VAE.",
        )
    return {
        "base_dim": base,
        "z_dim": latent,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": _res_blocks(shapes),
        "temperal_downsample": [False, True, True],
    }


def _derive_residual_vae(shapes: ShapesOf, base: int) -> dict[str, Any]:
    colours = shapes.of("encoder.conv_in.weight", 5)[1]
    return {
        "base_dim": base,
        "decoder_base_dim": shapes.of("decoder.conv_in.weight", 5)[0] // 4,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": _res_blocks(shapes),
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": colours,
        "out_channels": colours,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(MEAN_48),
        "latents_std": list(STD_48),
    }


def transformer_title(config: Mapping[str, Any]) -> str:
    """Return the model's name for people: "Wan2.1 I2V 14B"."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = config["num_layers"]
    size = SIZES.get((width, layers, config["ffn_dim"]), f"({width} wide, {layers} layers)")
    if config["in_channels"] == config["out_channels"] == 48:
        return f"Wan2.2 TI2V {size}"
    if wants_picture(config) and not config.get("image_dim"):
        return f"Wan2.2 I2V A{size}" if size == "14B" else f"Wan2.2 I2V {size}"
    return f"Wan2.1 {_task(config)} {size}"


def wants_picture(config: Mapping[str, Any]) -> bool:
    """Return whether latents of a picture come in beside the noise."""
    return bool(config["in_channels"] > config["out_channels"])


def _task(config: Mapping[str, Any]) -> str:
    if config.get("pos_embed_seq_len"):
        return "FLF2V"
    return "I2V" if config.get("image_dim") else "T2V"


def adapted_title(width: int | None, blocks: int, pictured: bool) -> str:
    """Return the name of the model that a LoRA was made for: "Wan2.1 I2V 14B (5120 wide, 40
    blocks)"."""
    sizes = {dim: size for (dim, _, _), size in SIZES.items()}
    size = "" if width is None else f" {sizes.get(width, 'of another size')} ({width} wide"
    count = "" if not blocks or width is None else f", {blocks} blocks"
    task = " I2V" if pictured else ""
    return f"Wan2.1{task}{size}{count}{')' if size else ''}"


def text_title(config: Mapping[str, Any]) -> str:
    """Return the text encoder's name for people."""
    xxl = (config["d_model"], config["num_layers"]) == (4096, 24)
    return "UMT5-XXL encoder" if xxl else f"UMT5 encoder ({config['d_model']} wide)"


def image_title(config: Mapping[str, Any]) -> str:
    """Return the image encoder's name for people."""
    huge = (config["hidden_size"], config["num_hidden_layers"]) == (1280, 32)
    return "CLIP ViT-H/14" if huge else f"CLIP ViT ({config['hidden_size']} wide)"


def vae_title(config: Mapping[str, Any]) -> str:
    """Return the VAE's name for people."""
    if config.get("is_residual"):
        size = "" if config["base_dim"] == 160 else f" ({config['base_dim']} wide)"
        return f"Wan2.2 VAE{size}"
    return "Wan2.1 VAE" if config["base_dim"] == 96 else f"Wan VAE ({config['base_dim']} wide)"
