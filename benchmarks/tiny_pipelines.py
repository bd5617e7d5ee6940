"""Tiny random pipelines of diffusers, built from configs in memory, each with a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


@dataclass(frozen=True)
class Tiny:
    """A pipeline, and what calls it: every tensor of its result."""

    pipe: Any
    call: Callable[[], tuple[Tensor, ...]]


def tokenizer(length: int = 16) -> Any:
    """A token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", model_max_length=length, chat_template=CHAT,
    )  # fmt: skip


def t5(width: int = 16, *, relative: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{relative}Config")(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return getattr(transformers, f"{relative}EncoderModel")(config)


def clip(width: int = 16, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width, eos_token_id=1,
        bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_vision(width: int = 16, size: int = 28) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=size, patch_size=14, projection_dim=width,
    ))  # fmt: skip


def clip_pictures() -> Any:
    from transformers import CLIPImageProcessorPil

    square = {"height": 28, "width": 28}
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)


def qwen2_5_vl(width: int = 32) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": width, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 4096, "rope_parameters": rope,
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                       "out_hidden_size": width},
    ))  # fmt: skip


def qwen3(width: int = 32) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(
        vocab_size=64, hidden_size=width, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
    ))  # fmt: skip


def gemma3(width: int = 24) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(Gemma3Config(
        text_config={
            "vocab_size": 64, "hidden_size": width, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=63, boi_token_index=61, eoi_token_index=62,
    ))  # fmt: skip


def wan_vae(z_dim: int = 4) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=z_dim, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        latents_mean=[0.1] * z_dim, latents_std=[1.2] * z_dim,
    )  # fmt: skip


def picture_vae(channels: int = 4, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=2, latent_channels=channels,
        norm_num_groups=4, sample_size=32, **changes,
    )  # fmt: skip


def hunyuan_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip


def flow(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**changes)


def unipc(shift: float = 5.0) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def picture(size: tuple[int, int] = (32, 32), turn: int = 0) -> Image.Image:
    grey = Image.radial_gradient("L").resize(size)
    return Image.merge("RGB", (grey, grey.rotate(90 + turn), grey.rotate(180)))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _made(kind: Any, frames: str = "frames", asked: Mapping[str, Any] | None = None,
          steps: int = 2, **parts: Any) -> Tiny:  # fmt: skip
    """A pipeline over its parts, called with ``asked``; its tensors are those of ``frames``."""
    for each in parts.values():
        if isinstance(each, nn.Module):
            each.eval().requires_grad_(False)
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "fox", "output_type": "pt", "num_inference_steps": steps, **(asked or {})}

    def call() -> tuple[Tensor, ...]:
        out = pipe(**given, generator=_seeded())
        return tuple(torch.as_tensor(getattr(out, name)[0]) for name in frames.split())

    return Tiny(pipe, call)


def _ltx2_parts() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    connector = {
        f"{kind}_connector_{key}": value
        for kind in ("video", "audio")
        for key, value in {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
                           "num_learnable_registers": 8}.items()
    }  # fmt: skip
    return {
        "transformer": LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8,
            audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=3, caption_channels=24,
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8, latent_channels=2, ch_mult=(1, 2, 4), num_res_blocks=1,
            sample_rate=1600, mel_hop_length=16, mel_bins=16,
        ),
        "text_encoder": gemma3(), "tokenizer": tokenizer(),
        "connectors": LTX2TextConnectors(caption_channels=24, text_proj_in_factor=4, **connector),
        "vocoder": LTX2Vocoder(
            in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]],
            output_sampling_rate=1600,
        ),
        "scheduler": flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
    }  # fmt: skip


_LTX2_ASKED = {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16,
               "spatio_temporal_guidance_blocks": [1]}  # fmt: skip


def ltx2() -> Tiny:
    from diffusers import LTX2Pipeline

    return _made(LTX2Pipeline, "frames audio", _LTX2_ASKED, **_ltx2_parts())


def ltx2_i2v() -> Tiny:
    from diffusers import LTX2ImageToVideoPipeline

    asked = {**_LTX2_ASKED, "image": picture((96, 64))}
    return _made(LTX2ImageToVideoPipeline, "frames audio", asked, **_ltx2_parts())


def hunyuan_video15() -> Tiny:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        T5Config,
        T5EncoderModel,
    )

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    made = _made(
        HunyuanVideo15Pipeline,
        asked={"prompt": 'a sign that says "open"', "negative_prompt": "", "height": 32,
               "width": 48, "num_frames": 5},
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
            rope_parameters=rope,
        )),
        text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=384, d_model=20, d_kv=10, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )),
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=3, num_refiner_layers=2, text_embed_dim=32, text_embed_2_dim=20,
            image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=64, task_type="t2v",
        ),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
            temporal_compression_ratio=4, spatial_compression_ratio=16,
        ),
        tokenizer=tokenizer(2000), tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0), scheduler=flow(shift=7.0),
    )  # fmt: skip
    made.pipe.vision_num_semantic_tokens = 9
    return made


def kandinsky5() -> Tiny:
    from diffusers import Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    class Words:
        """What the pipeline asks of a Qwen2VLProcessor."""

        def __init__(self) -> None:
            self._own = tokenizer(2000)

        def __call__(self, text: Any, images: Any = None, videos: Any = None, **more: Any) -> Any:
            return self._own(text, **more)

        def decode(self, ids: Any) -> str:
            return str(self._own.decode(ids))

    made = _made(
        Kandinsky5T2VPipeline,
        asked={"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 512},
        transformer=Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, out_visual_dim=4,
            model_dim=32, ff_dim=48, num_text_blocks=2, num_visual_blocks=4, axes_dims=(4, 6, 6),
        ),
        vae=hunyuan_vae(), text_encoder=qwen2_5_vl(), text_encoder_2=clip(),
        tokenizer=tokenizer(2000), tokenizer_2=tokenizer(), scheduler=flow(),
    )  # fmt: skip
    made.pipe.tokenizer = Words()
    return made


def cogvideox() -> Tiny:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    return _made(
        CogVideoXPipeline,
        asked={"height": 16, "width": 16, "num_frames": 8, "max_sequence_length": 16},
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
            time_embed_dim=8, text_embed_dim=16, num_layers=4, sample_width=2, sample_height=2,
            sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16,
        ),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=t5(), tokenizer=tokenizer(), scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


class Lenient(nn.Module):
    """A safety checker that lets everything pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def check_text_safety(self, prompt: str) -> bool:
        return bool(self.weight > 0)

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos() -> Tiny:
    from diffusers import (
        AutoencoderKLCosmos,
        CosmosTextToWorldPipeline,
        CosmosTransformer3DModel,
        EDMEulerScheduler,
    )

    return _made(
        CosmosTextToWorldPipeline,
        asked={"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16},
        transformer=CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=3, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
            patch_size=(1, 2, 2), extra_pos_embed_type="learnable",
            concat_padding_mask=False,  # with it, its forward needs torchvision
        ),
        vae=AutoencoderKLCosmos(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64,
            num_layers=2, patch_size=4,
        ),
        text_encoder=t5(), tokenizer=tokenizer(), safety_checker=Lenient(),
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5,
                                    sigma_schedule="karras", final_sigmas_type="sigma_min"),
    )  # fmt: skip


_WAN_BLOCK = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 8,
              "ffn_dim": 40, "num_layers": 4, "cross_attn_norm": True,
              "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}  # fmt: skip
_WAN_ASKED = {"negative_prompt": "cat", "height": 32, "width": 32, "num_frames": 5,
              "max_sequence_length": 16}  # fmt: skip


def skyreels_v2() -> Tiny:
    from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

    return _made(
        SkyReelsV2Pipeline, asked=_WAN_ASKED,
        transformer=SkyReelsV2Transformer3DModel(in_channels=4, out_channels=4, **_WAN_BLOCK),
        vae=wan_vae(), text_encoder=t5(relative="UMT5"), tokenizer=tokenizer(),
        scheduler=unipc(8.0),
    )  # fmt: skip


def wan_vace() -> Tiny:
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    return _made(
        WanVACEPipeline,
        asked={**_WAN_ASKED, "video": [picture((32, 32), n) for n in range(5)],
               "mask": [Image.new("L", (32, 32), 255)] * 5},
        transformer=WanVACETransformer3DModel(
            in_channels=4, out_channels=4, vace_layers=[0, 2], vace_in_channels=72, **_WAN_BLOCK
        ),
        vae=wan_vae(), text_encoder=t5(relative="UMT5"), tokenizer=tokenizer(), scheduler=unipc(),
    )  # fmt: skip


def wan22_t2v() -> Tiny:
    from diffusers import WanPipeline, WanTransformer3DModel

    def expert() -> Any:
        return WanTransformer3DModel(in_channels=4, out_channels=4, **_WAN_BLOCK)

    return _made(
        WanPipeline, asked=_WAN_ASKED, steps=4,
        transformer=expert(), transformer_2=expert(), boundary_ratio=0.875, vae=wan_vae(),
        text_encoder=t5(relative="UMT5"), tokenizer=tokenizer(), scheduler=unipc(),
    )  # fmt: skip


def wan_animate() -> Tiny:
    from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

    faces = [picture((16, 16), n) for n in range(5)]
    return _made(
        WanAnimatePipeline,
        asked={"negative_prompt": "cat", "height": 32, "width": 32, "max_sequence_length": 16,
               "image": picture(), "pose_video": [picture((32, 32), n) for n in range(5)],
               "face_video": faces, "segment_frame_length": 5, "guidance_scale": 2.0},
        transformer=WanAnimateTransformer3DModel(
            in_channels=12, latent_channels=4, out_channels=4, image_dim=16,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16,
            motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
            face_encoder_num_heads=2, inject_face_latents_blocks=2, **_WAN_BLOCK,
        ),
        vae=wan_vae(), text_encoder=t5(relative="UMT5"), tokenizer=tokenizer(),
        image_encoder=clip_vision(), image_processor=clip_pictures(), scheduler=unipc(),
    )  # fmt: skip


def mochi() -> Tiny:
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    return _made(
        MochiPipeline,
        asked={"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16},
        transformer=MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=4, pooled_projection_dim=16,
            in_channels=12, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
        ),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5(), tokenizer=tokenizer(), scheduler=flow(invert_sigmas=True),
    )  # fmt: skip


def flux() -> Tiny:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    return _made(
        FluxPipeline, "images", {"height": 16, "width": 16, "max_sequence_length": 16},
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=3, num_single_layers=5,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        ),
        vae=picture_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=clip(), tokenizer=tokenizer(77), text_encoder_2=t5(),
        tokenizer_2=tokenizer(), scheduler=flow(),
    )  # fmt: skip


def qwen_image() -> Tiny:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    return _made(
        QwenImagePipeline, "images",
        {"height": 32, "width": 32, "negative_prompt": "cat", "true_cfg_scale": 2.0},
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
            latents_mean=[0.1] * 4, latents_std=[1.2] * 4,
        ),
        text_encoder=qwen2_5_vl(), tokenizer=tokenizer(2000), scheduler=flow(),
    )  # fmt: skip


def z_image() -> Tiny:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    return _made(
        ZImagePipeline, "images",
        {"height": 32, "width": 32, "max_sequence_length": 16, "negative_prompt": "cat"},
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
            cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
        vae=picture_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=qwen3(), tokenizer=tokenizer(2000), scheduler=flow(),
    )  # fmt: skip


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 3),
        projection_class_embeddings_input_dim=16 + 6 * 8, cross_attention_dim=32,
    )  # fmt: skip


def _sdxl_parts() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "vae": picture_vae(), "text_encoder": clip(), "tokenizer": tokenizer(77),
        "text_encoder_2": clip(projected=True), "tokenizer_2": tokenizer(77), "unet": _unet(),
        "scheduler": EulerDiscreteScheduler(),
    }  # fmt: skip


def sdxl() -> Tiny:
    from diffusers import StableDiffusionXLPipeline

    return _made(StableDiffusionXLPipeline, "images", {"height": 32, "width": 32}, **_sdxl_parts())


def sdxl_controlnet() -> Tiny:
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    parts = _sdxl_parts()
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    for parameter in control.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return _made(
        StableDiffusionXLControlNetPipeline, "images",
        {"height": 32, "width": 32, "image": picture()}, controlnet=control, **parts,
    )  # fmt: skip


def latte() -> Tiny:
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    return _made(
        LattePipeline,
        asked={"height": 16, "width": 16, "video_length": 2, "clean_caption": False},
        transformer=LatteTransformer3DModel(
            num_layers=3, sample_size=8, patch_size=2, attention_head_dim=8,
            num_attention_heads=3, caption_channels=16, in_channels=4, cross_attention_dim=24,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
            video_length=2,
        ),
        vae=picture_vae(), text_encoder=t5(), tokenizer=tokenizer(120),
        scheduler=DDIMScheduler(),
    )  # fmt: skip


def _shaken(model: Any) -> Any:
    """Zeros and ones moved, so that every weight counts."""
    for name, p in model.named_parameters():
        if p.ndim == 1 or "scale" in name or "token" in name:
            p.data.add_(0.2 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True}  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 51, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "max_position_embeddings": 4096, "rope_parameters": rope,
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    ))  # fmt: skip


class Kinds:
    """What the text-only way of MiniMax-H3 asks of a Qwen3VLProcessor."""

    @staticmethod
    def create_mm_token_type_ids(rows: Any) -> Any:
        return [[0 for _ in row] for row in rows]


def minimax_h3() -> Tiny:
    from diffusers import (
        AutoencoderKLMiniMaxH3,
        AutoencoderKLMiniMaxH3Audio,
        MiniMaxH3Scheduler,
        MiniMaxH3Transformer3DModel,
    )
    from diffusers.modular_pipelines import MiniMaxH3Blocks

    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(
        transformer=_shaken(MiniMaxH3Transformer3DModel(
            num_attention_heads=3, attention_head_dim=24, hidden_size=40, num_layers=3,
            num_refiner_layers=2, ffn_dim=56, in_channels=4, audio_in_channels=6, text_dim=32,
            freq_dim=16, time_embed_hidden_dim=40, time_embed_dim=20, rope_freq_dim=4,
        )),
        vae=_shaken(AutoencoderKLMiniMaxH3(
            latent_channels=4, block_out_channels=(8,) * 6, layers_per_block=1,
            norm_num_groups=4, decoder_num_layers=2, decoder_num_attention_heads=2,
            decoder_attention_head_dim=16, latents_mean=(0.1,) * 4, latents_std=(1.2,) * 4,
        )),
        audio_vae=_shaken(AutoencoderKLMiniMaxH3Audio(
            encoder_dim=4, encoder_rates=(2, 4), latent_dim=24, latent_channels=6,
            num_attention_heads=2, decoder_dim=16, decoder_rates=(4, 2),
            decoder_kernel_sizes=(8, 4), resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),), sampling_rate=320, latents_mean=[0.0] * 6,
            latents_std=[1.0] * 6,
        )),
        text_encoder=_qwen3_vl().eval().requires_grad_(False), tokenizer=tokenizer(2000),
        processor=Kinds(), scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def call() -> tuple[Tensor, ...]:
        out = pipe(
            prompt="fox", height=32, width=64, num_frames=124, num_inference_steps=3,
            output_type="pt", generator=_seeded(), output=["videos", "audio"],
        )  # fmt: skip
        return out["videos"][0], out["audio"]

    return Tiny(pipe, call)


def wan_animate2() -> Tiny:
    from diffusers import ClassifierFreeGuidance, WanAnimate2Transformer3DModel
    from diffusers.modular_pipelines import WanAnimate2Blocks

    pipe = WanAnimate2Blocks().init_pipeline()
    vision = clip_vision(1280, 224)
    parts = {
        "transformer": WanAnimate2Transformer3DModel(
            in_dim=12, dim=24, ffn_dim=40, freq_dim=8, text_dim=16, out_dim=4, num_heads=2,
            num_layers=4,
        ),
        "vae": wan_vae(), "text_encoder": t5(relative="UMT5"), "image_encoder": vision,
    }  # fmt: skip
    for each in parts.values():
        each.eval().requires_grad_(False)
    pipe.update_components(
        **parts, tokenizer=tokenizer(), scheduler=flow(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def call() -> tuple[Tensor, ...]:
        out = pipe(
            prompt="fox", negative_prompt="cat", prompt_ref="pose", max_sequence_length=16,
            image=picture(), height=32, width=32, num_inference_steps=2, output_type="pt",
            driving_video=[picture((32, 32), n) for n in range(5)], segment_frame_length=5,
            generator=_seeded(), output="videos",
        )  # fmt: skip
        return tuple(torch.as_tensor(each) for each in out)

    return Tiny(pipe, call)


RECIPES: Mapping[str, Callable[[], Tiny]] = MappingProxyType({
    "LTX-2": ltx2, "LTX-2 I2V": ltx2_i2v, "HunyuanVideo 1.5": hunyuan_video15,
    "Kandinsky 5": kandinsky5, "CogVideoX": cogvideox, "Cosmos": cosmos,
    "SkyReels-V2": skyreels_v2, "Wan VACE": wan_vace, "Wan2.2 A14B": wan22_t2v,
    "Wan-Animate": wan_animate, "Mochi": mochi, "Flux": flux, "Qwen-Image": qwen_image,
    "Z-Image": z_image, "SDXL": sdxl, "SDXL ControlNet": sdxl_controlnet, "Latte": latte,
    "MiniMax-H3": minimax_h3, "Wan-Animate-2": wan_animate2,
})  # fmt: skip


def build(name: str, seed: int = 0) -> Tiny:
    """One of them; its weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RECIPES[name]()
