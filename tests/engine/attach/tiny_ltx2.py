"""A pipeline that penstock has no code for: a small random LTX-2, which makes frames and sound."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
REQUEST: dict[str, Any] = {
    "prompt": "fox", "height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 8,
    "num_inference_steps": 2,
}  # fmt: skip


def ltx2(seed: int = 0) -> Any:
    """The pipeline, its weights a function of the seed."""
    import diffusers
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(seed)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=4, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, latent_channels=2, ch_mult=(1, 2, 4), num_res_blocks=1, sample_rate=1600,
        mel_hop_length=16, mel_bins=16,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=8, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]], output_sampling_rate=1600,
    )  # fmt: skip
    parts = {
        "transformer": transformer, "vae": vae, "audio_vae": sound, "text_encoder": _gemma(),
        "connectors": connectors, "vocoder": vocoder,
    }  # fmt: skip
    for each in parts.values():
        each.eval().requires_grad_(False)
    made = diffusers.LTX2Pipeline(
        **parts, tokenizer=_letters(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    made.set_progress_bar_config(disable=True)
    return made


def made(pipe: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """Frames and sound."""
    draw = torch.Generator().manual_seed(1)
    out = pipe(**REQUEST | {"output_type": "pt", "generator": draw} | changes)
    return out.frames, out.audio


@cache
def wanted() -> tuple[Tensor, Tensor]:
    """What the plain pipeline makes."""
    return made(ltx2())


def _gemma() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16,
        "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63,
        boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def _letters() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
    table = {word: place for place, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    )  # fmt: skip
