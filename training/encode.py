"""Stage 2: precompute latents of pictures, each with several motions, for the transformer.

Every shard holds, for one size: ``latents`` (scenes, motions, 16, 5, h/8, w/8) and ``condition``
(scenes, 16, 5, h/8, w/8), both normalised by the autoencoder's statistics, ``pixels`` (scenes, 3,
side, side) and ``ids`` (scenes, motions, tokens).
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.clips import Scene, caption, possible_motions, random_scene, render, rng_for
from training.common import pick_device
from training.models import build_image_processor, build_tokenizer, pixels_for
from training.settings import BUCKET_SHARES, BUCKETS, ENCODE, FRAMES
from training.train_vae import build_vae, to_batch
from training.wholeclip import encode_moments

TOKENS = 26
"""Text slots: the longest caption, its end mark and one pad."""


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The autoencoder of a run, with its statistics where they were measured."""
    vae = build_vae()
    tensors = load_file(folder / "vae.safetensors")
    vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    statistics = folder / "statistics.json"
    if statistics.exists():
        vae.register_to_config(**json.loads(statistics.read_text()))
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, batch: Tensor) -> Tensor:
    """Mean latents (b, 16, t, h, w) of clips (b, 3, t, h, w), in the autoencoder's own scale."""
    return encode_moments(vae, batch).chunk(2, dim=1)[0]


def condition_clips(pictures: Tensor, frames: int) -> Tensor:
    """Pictures (b, 3, h, w) followed by frames of zeros, (b, 3, frames, h, w)."""
    clip = pictures.new_zeros(*pictures.shape[:2], frames, *pictures.shape[2:])
    clip[:, :, 0] = pictures
    return clip


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents in units of the statistics in the autoencoder's configuration."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents.device)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents.device)
    return (latents - mean) / std


def scene_motions(rng: np.random.Generator, scene: Scene, count: int) -> list[tuple[Tensor, str]]:
    """``count`` different motions of a scene: clip (3, t, h, w) and caption of each.

    Turns, the hardest to learn, are twice as likely as the others.
    """
    possible = possible_motions(scene)
    kinds = sorted({motion.kind for motion in possible})
    chances = np.array([2.0 if "clockwise" in kind else 1.0 for kind in kinds])
    some = min(count, len(kinds))
    chosen = []
    for kind in rng.choice(kinds, some, replace=False, p=chances / chances.sum()):
        same = [motion for motion in possible if motion.kind == kind]
        chosen.append(same[int(rng.integers(len(same)))])
    while len(chosen) < count:
        chosen.append(possible[int(rng.integers(len(possible)))])
    return [
        (to_batch([render(scene, motion, FRAMES)])[0], caption(rng, scene, motion))
        for motion in chosen
    ]


def measure(vae: AutoencoderKLWan, folder: Path, count: int = 24) -> None:
    """Write mean and deviation of each latent channel over rendered clips."""
    clips = []
    for index in range(count):
        rng = rng_for("train", 50_000_000 + index)
        scene = random_scene(rng)
        clips.append(scene_motions(rng, scene, 1)[0][0])
    device = next(vae.parameters()).device
    latents = torch.cat([encode(vae, clip[None].to(device)) for clip in clips]).cpu()
    flat = latents.transpose(0, 1).flatten(1)
    statistics = {"latents_mean": flat.mean(1).tolist(), "latents_std": flat.std(1).tolist()}
    (folder / "statistics.json").write_text(json.dumps(statistics))
    vae.register_to_config(**statistics)


def make_shard(vae: AutoencoderKLWan, number: int) -> dict[str, Tensor]:
    """Shard ``number``; a function of the number and the autoencoder alone."""
    device = next(vae.parameters()).device
    height, width = BUCKETS[int(rng_for("train", 60_000_000 + number).choice(3, p=BUCKET_SHARES))]
    tokenizer, processor = build_tokenizer(), build_image_processor()
    rows: dict[str, list[Tensor]] = {"latents": [], "condition": [], "pixels": [], "ids": []}
    for index in range(ENCODE.shard):
        rng = rng_for("train", 70_000_000 + number * ENCODE.shard + index)
        scene = random_scene(rng, height, width)
        pairs = scene_motions(rng, scene, ENCODE.motions)
        clips = torch.stack([clip for clip, _ in pairs]).to(device)
        blank = condition_clips(clips[:1, :, 0], FRAMES)
        with torch.autocast(device.type, torch.bfloat16):
            encoded = encode(vae, torch.cat([clips, blank])).float()
        latents = normalise(vae, encoded).cpu()
        if not latents.isfinite().all():
            raise FloatingPointError(f"latents of scene {index} of shard {number} are not finite")
        ids = tokenizer(
            [text for _, text in pairs],
            padding="max_length",
            max_length=TOKENS,
            return_tensors="pt",
        ).input_ids
        rows["latents"].append(latents[:-1])
        rows["condition"].append(latents[-1])
        rows["pixels"].append(pixels_for(processor, render(scene, frames=1)[0]))
        rows["ids"].append(ids.to(torch.int32))
    return {key: torch.stack(value).contiguous() for key, value in rows.items()}


def fill(vae: AutoencoderKLWan, shards: Path, scenes: int) -> None:
    """Write the shards that are missing up to ``scenes``."""
    shards.mkdir(exist_ok=True)
    vae.to(pick_device())
    for number in range(-(-scenes // ENCODE.shard)):
        target = shards / f"{number:05}.safetensors"
        if not target.exists():
            save_file(make_shard(vae, number), target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)
            print(f"shard {number}", flush=True)
