"""Random-weight Wan models of the true architecture, a few MB small, for the demo and for tests.

The folder is written by diffusers' own ``save_pretrained``: a model like any other.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from penstock.engine.families.wan.config import MEAN_48, STD_48
from penstock.engine.files.spm import CONTROL, NORMAL, UNKNOWN, SpmModel, build_backend
from penstock.engine.files.tokenizer import TOKENS

_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 48,
    "freq_dim": 64,
    "ffn_dim": 224,
    "num_layers": 6,
    "rope_max_seq_len": 128,
}
_VAE: dict[str, Any] = {"base_dim": 16, "num_res_blocks": 1}
_VAE_48: dict[str, Any] = {
    "decoder_base_dim": 16, "z_dim": 48, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    "latents_mean": list(MEAN_48), "latents_std": list(STD_48),
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 4,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 40,
    "hidden_act": "gelu",
}


def write_tiny_model(
    folder: Path,
    *,
    image_to_video: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    image: dict[str, Any] | None = None,
    experts: bool = False,
    tokenwise: bool = False,
) -> Path:
    """Write a random Wan2.1 model in diffusers format and return ``folder``.

    Args:
        folder: where to write; created if absent.
        image_to_video: an I2V model (with CLIP image encoder, 36 input channels), else T2V.
        seed: the weights are a function of it.
        dtype: storage type of all weights.
        transformer, vae, text, image: config entries that replace the tiny defaults.
        experts: two transformers instead of one, and no image encoder: Wan2.2 A14B.
        tokenwise: Wan2.2's own VAE, and a timestep a token: Wan2.2 TI2V.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline

    if tokenwise:
        transformer = {"in_channels": 48, "out_channels": 48} | (transformer or {})
        vae = _VAE_48 | (vae or {})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _text_parts(text or {}) | _video_parts(image_to_video, transformer or {}, vae or {})
        if experts:
            own = {"in_channels": 36} if image_to_video else {}
            for name in ("transformer", "transformer_2"):
                parts[name] = _transformer(own | (transformer or {}))
            parts["boundary_ratio"] = 0.9 if image_to_video else 0.875
        elif tokenwise:
            parts["transformer"] = _transformer(transformer or {})
            parts["expand_timesteps"] = True
        elif image_to_video:
            parts |= _image_parts(image or {})
            parts["transformer"] = _transformer(
                _image_conditioning(parts["image_encoder"].config.hidden_size, transformer or {})
                | {"text_dim": parts["text_encoder"].config.d_model}
                | (transformer or {})
            )
    pipeline_class = WanImageToVideoPipeline if image_to_video else WanPipeline
    pipeline = pipeline_class(**parts)
    if dtype != torch.float32:
        pipeline = pipeline.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _image_conditioning(image_dim: int, overrides: dict[str, Any]) -> dict[str, Any]:
    config = _TRANSFORMER | overrides
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    return {"in_channels": 36, "image_dim": image_dim, "added_kv_proj_dim": inner}


def _transformer(overrides: dict[str, Any]) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**(_TRANSFORMER | overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _video_parts(
    image_to_video: bool, transformer: dict[str, Any], vae: dict[str, Any]
) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    return {
        "transformer": None if image_to_video else _transformer(transformer),
        "vae": AutoencoderKLWan(**(_VAE | vae)).eval(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _text_parts(overrides: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    config = UMT5Config(**(_TEXT | overrides))
    pieces = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    pieces += [("▁", -2.0, NORMAL)]
    pieces += [(letter, -3.0, NORMAL) for letter in string.printable[:94]]
    model = SpmModel(tuple(pieces), b"", byte_fallback=False, dummy_prefix=True, squeeze=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_backend(model),
        model_max_length=TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return {"text_encoder": UMT5EncoderModel(config).eval(), "tokenizer": tokenizer}


def _image_parts(overrides: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**(_IMAGE | overrides))
    size = config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}
