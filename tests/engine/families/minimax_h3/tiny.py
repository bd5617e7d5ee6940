"""A tiny random MiniMax-H3 in diffusers' modular layout, and what diffusers makes of a job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Scheduler,
)
from diffusers.modular_pipelines import MiniMaxH3Blocks
from PIL import Image

from penstock.engine.families.minimax_h3.text import tiny as text
from tests.engine.families.minimax_h3 import makers

VAE: dict[str, Any] = {
    "latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8, 8), "layers_per_block": 1,
    "norm_num_groups": 4, "decoder_num_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 16, "latents_mean": (0.1,) * 4, "latents_std": (1.2,) * 4,
}  # fmt: skip
AUDIO: dict[str, Any] = {
    "encoder_dim": 4, "encoder_rates": (2, 4), "latent_dim": 24, "latent_channels": 6,
    "num_attention_heads": 2, "decoder_dim": 16, "decoder_rates": (4, 2),
    "decoder_kernel_sizes": (8, 4), "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 3),), "sampling_rate": 320, "latents_mean": [0.0] * 6,
    "latents_std": [1.0] * 6,
}  # fmt: skip
SCHEDULES = {"scheduler": 12.0, "audio_scheduler": 3.0}


@dataclass(frozen=True)
class TinyH3:
    """A model and its parts.

    Attributes:
        folder: as diffusers' modular pipeline saves it.
        parts: its components by name.
    """

    folder: Path
    parts: dict[str, Any]

    def theirs(self, **asked: Any) -> Any:
        """What diffusers' modular pipeline makes of a job: its state."""
        pipe = MiniMaxH3Blocks().init_pipeline()
        pipe.update_components(**self.parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe(**asked)


def write(folder: Path, dtype: torch.dtype = torch.float32) -> TinyH3:
    """Make one in ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parts: dict[str, Any] = {
            "vae": makers.shaken(AutoencoderKLMiniMaxH3(**VAE)),
            "audio_vae": makers.shaken(AutoencoderKLMiniMaxH3Audio(**AUDIO)),
            "text_encoder": text.write(folder, dtype),
        }
    parts["transformer"] = makers.transformer(dtype)
    parts |= {name: MiniMaxH3Scheduler(shift=shift) for name, shift in SCHEDULES.items()}
    for name in ("vae", "audio_vae", "transformer"):
        parts[name].save_pretrained(folder / name)
    for name in SCHEDULES:
        parts[name].save_pretrained(folder / name)
    index: dict[str, Any] = {"_class_name": "MiniMaxH3ModularPipeline"}
    for name, part in parts.items():
        owner = "transformers" if name == "text_encoder" else "diffusers"
        index[name] = [owner, type(part).__name__, {"subfolder": name}]
    index["tokenizer"] = ["transformers", "Qwen2TokenizerFast", {"subfolder": "tokenizer"}]
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    parts |= {"tokenizer": text.tokenizer(), "processor": Processor()}
    return TinyH3(folder, parts)


class Processor:
    """Of transformers' `Qwen3VLProcessor` what diffusers asks for, without torchvision."""

    def __init__(self) -> None:
        known = text.vocabulary()
        self._pad = known["<|image_pad|>"]

    @property
    def image_processor(self) -> Any:
        """transformers' own, of the tiny config."""
        from transformers import Qwen2VLImageProcessorPil

        known = {name: each for name, each in text.PROCESSOR.items() if "type" not in name}
        return Qwen2VLImageProcessorPil(**known)

    def create_mm_token_type_ids(self, ids: list[list[int]]) -> list[list[int]]:
        """1 where a picture's token stands."""
        return [[int(token == self._pad) for token in each] for each in ids]


def picture(path: Path, size: tuple[int, int] = (70, 40)) -> Path:
    """A picture with structure in every direction."""
    gradient = Image.radial_gradient("L").resize(size)
    turned = gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    Image.merge("RGB", (gradient, turned, gradient.point(lambda v: 255 - v))).save(path)
    return path
