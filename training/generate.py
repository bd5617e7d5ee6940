"""Batched image-to-video sampling with the small model, the arithmetic of the diffusers pipeline.

The pipeline takes one picture a call; scoring wants many.  Differences in kind are none: the same
conditioning, guidance and scheduler, with the pads of the text summed up in one token.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.encode import TOKENS, condition_clips, encode, normalise
from training.models import (
    BiasedAttention,
    MiniWan,
    build_image_processor,
    build_scheduler,
    build_tokenizer,
    pixels_for,
)
from training.settings import FRAMES
from training.train_dit import build_model, with_mask
from training.train_vae import to_batch
from training.wholeclip import decode_clip


@dataclass(frozen=True)
class Sampler:
    """Default sampler settings of the model."""

    steps: int = 12
    guidance_scale: float = 3.0
    shift: float = 3.0


def default_sampler(folder: Path) -> Sampler:
    """The settings that a model folder's defaults.json asks for."""
    values = json.loads((folder / "defaults.json").read_text())
    return Sampler(**{field.name: values[field.name] for field in fields(Sampler)})


@dataclass
class Generator:
    """A trained model, ready to sample."""

    model: MiniWan
    attention: BiasedAttention
    vae: AutoencoderKLWan

    @torch.no_grad()
    def __call__(
        self, pictures: list[np.ndarray], prompts: list[str], sampler: Sampler, seed: int
    ) -> np.ndarray:
        """Clips (b, frames, h, w, 3) in [0, 1] for pictures (h, w, 3) of one size."""
        images = to_batch([picture[None] for picture in pictures])[:, :, 0]
        condition = with_mask(
            normalise(self.vae, encode(self.vae, condition_clips(images, FRAMES)))
        )
        processor = build_image_processor()
        pixels = torch.stack([pixels_for(processor, picture) for picture in pictures])
        image_states = self.model.encode_image(pixels)
        rng = torch.Generator().manual_seed(seed)
        latents = torch.randn(condition[:, 4:].shape, generator=rng)
        texts = [self._text(prompts), self._text([""] * len(prompts))]
        scheduler = build_scheduler(sampler.shift)
        scheduler.set_timesteps(sampler.steps)
        for moment in scheduler.timesteps:
            given = torch.cat([latents, condition], dim=1)
            asked, plain = (
                self._velocity(given, moment, states, bias, image_states) for states, bias in texts
            )
            velocity = plain + sampler.guidance_scale * (asked - plain)
            latents = scheduler.step(velocity, moment, latents, return_dict=False)[0]
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)
        frames = decode_clip(self.vae, latents * std + mean).clamp(-1, 1)
        return (frames.permute(0, 2, 3, 4, 1) / 2 + 0.5).numpy()

    def _text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and bias of a list of prompts."""
        tokens = build_tokenizer()(
            prompts, padding="max_length", max_length=TOKENS, return_tensors="pt"
        )
        return self.model.encode_text(tokens.input_ids)

    def _velocity(
        self, given: Tensor, moment: Tensor, states: Tensor, bias: Tensor, image: Tensor
    ) -> Tensor:
        """The transformer's output for one timestep."""
        self.attention.text_bias = bias
        velocity: Tensor = self.model.transformer(
            given,
            timestep=moment.expand(given.shape[0]),
            encoder_hidden_states=states,
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        return velocity


def from_folder(folder: Path) -> Generator:
    """The generator of a shipped folder, in fp32."""
    model = build_model(folder).eval()
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    return Generator(model, model.use_biased_attention(), vae)
