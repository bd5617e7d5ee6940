"""Stage 1: train the causal 3-D autoencoder on rendered clips.

``python -m training.train_vae RUN_FOLDER`` resumes from ``vae.safetensors`` in it.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.clips import path, random_motion, random_scene, render, rng_for
from training.common import (
    SAVE_EVERY,
    Optimiser,
    load_state,
    pick_device,
    psnr,
    rate_at,
    read_step,
    save_state,
)
from training.settings import BUCKETS, FRAMES, VAE, VAE_CONFIG, VaeRun
from training.wholeclip import decode_clip, encode_moments


@torch.no_grad()
def init_weights(vae: AutoencoderKLWan) -> None:
    """Start near a linear autoencoder, so that colours pass through from the first step.

    The stock initialisation shrinks the signal in every convolution until the biases drown it, and
    the norms then hide it.  Here every convolution keeps the variance, residual branches start
    small, and only the first layers have biases, which the norms need to see brightness.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            fan = module.weight[0].numel()
            module.weight.normal_(std=fan**-0.5)
            module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.2)
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.mul_(0.2)
        elif isinstance(module, WanResample) and module.mode.startswith("downsample3d"):
            module.time_conv.weight.mul_(0.3)
            module.time_conv.weight[:, :, 2, 0, 0] += torch.eye(module.dim)
    vae.encoder.conv_in.bias.normal_(std=0.3)
    vae.decoder.conv_in.bias.normal_(std=0.3)
    vae.quant_conv.weight[vae.config.z_dim :].mul_(0.1)
    vae.quant_conv.bias[vae.config.z_dim :] = -6.0


def build_vae() -> AutoencoderKLWan:
    """A fresh autoencoder of the shipped size, convolutions laid out channels last."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def _window(low: float, high: float, size: int, limit: int, rng: np.random.Generator) -> int:
    """Start of a crop of ``size`` within ``limit`` that sees something of [low, high]."""
    start = int(rng.uniform(low - size * 0.75, high - size * 0.25))
    return max(0, min(limit - size, start))


def crop_clip(index: int, crop: int) -> np.ndarray:
    """Five frames (5, crop, crop, 3) cut from training clip ``index`` near its shape."""
    rng = rng_for("train", index)
    scene = random_scene(rng)
    motion = random_motion(rng, scene)
    first = int(rng.integers(FRAMES - 4))
    centre = path(scene, motion, FRAMES)[first + 2]
    x = _window(centre[0] - 8, centre[0] + 8, crop, 64, rng)
    y = _window(centre[1] - 8, centre[1] + 8, crop, 64, rng)
    return render(scene, motion)[first : first + 5, y : y + crop, x : x + crop]


def whole_clip(
    index: int, frames: int = FRAMES, split: str = "train", square: bool = False
) -> np.ndarray:
    """Clip ``index`` (frames, h, w, 3) in one of the sizes, or in the square one."""
    rng = rng_for(split, index)
    height, width = BUCKETS[0 if square else int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    scene = random_scene(rng, height, width)
    return render(scene, random_motion(rng, scene))[:frames]


def to_batch(clips: list[np.ndarray]) -> Tensor:
    """Clips (t, h, w, 3) in [0, 1] to a batch (b, 3, t, h, w) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) * 2 - 1
    return batch.contiguous(memory_format=torch.channels_last_3d)


def training_batch(step: int, run: VaeRun) -> Tensor:
    """The clips of one step; a function of the step alone, so that a resumed run repeats it."""
    index = (run.seed * 1_000_000 + step) * max(run.batch, run.pictures)
    if step < run.whole * run.steps:
        return to_batch([crop_clip(index + i, run.crop) for i in range(run.batch)])
    if step % 16 == 3:
        return to_batch([whole_clip(index)])
    if step % 4 == 1:
        return to_batch([whole_clip(index + i, 1, square=True) for i in range(run.pictures)])
    batch = to_batch([whole_clip(index, 9, square=True)])
    if step % 8 == 0:
        batch[:, :, 1:] = 0.0
    return batch


def vae_loss(
    vae: AutoencoderKLWan, batch: Tensor, kl: float, first: float
) -> tuple[Tensor, Tensor]:
    """Training loss, and mean squared error of the reconstruction, of one batch."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        moments = encode_moments(vae, batch)
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        frames = decode_clip(vae, latents)
    error = frames.float() - batch
    square = error.square().mean()
    weight = torch.ones(batch.shape[2], device=batch.device)
    weight[0] = first
    weight = (weight / weight.mean()).view(1, 1, -1, 1, 1)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    likeness = (weight * (error.abs() + 2 * error.square())).mean()
    return likeness + kl * divergence, square


@torch.no_grad()
def validate(vae: AutoencoderKLWan, count: int = 4, split: str = "validation") -> float:
    """Mean PSNR in dB over held-out clips (mean latents, fp32)."""
    device = next(vae.parameters()).device
    scores = []
    for index in range(count):
        batch = to_batch([whole_clip(index, split=split)]).to(device)
        latents = encode_moments(vae, batch).chunk(2, dim=1)[0]
        scores.append(psnr(decode_clip(vae, latents).clamp(-1, 1), batch))
    return float(np.mean(scores))


def train(folder: Path, run: VaeRun, init_from: Path | None = None) -> None:
    """Run or resume the stage until ``run.steps``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    device = pick_device()
    vae = build_vae().to(device)
    if init_from is None:
        init_weights(vae)
    else:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(init_from / "vae").state_dict())
    optimiser = Optimiser(vae, ("conv_in", "conv_out"), run.rate, run.matrix_rate, 0.0)
    state = folder / "vae.safetensors"
    step = load_state(state, vae, optimiser)
    fused = torch.compile(vae_loss, dynamic=False)  # not of whole clips: minutes for each shape
    saved, mean, began = time.monotonic(), 0.0, step
    started = time.monotonic()
    while step < run.steps:
        batch = training_batch(step, run).to(device)
        step_loss = fused if batch.shape[2] < FRAMES else vae_loss
        loss, square = step_loss(vae, batch, run.kl, run.first)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step(rate_at(step, run.steps, run.warmup, run.decay))
        step += 1
        mean = square.item() if step == began + 1 else 0.98 * mean + 0.02 * square.item()
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step - began)
            print(f"vae {step} psnr {10 * np.log10(4 / mean):.2f} {pace:.3f} s/step", flush=True)
        if step == run.steps or time.monotonic() - saved > SAVE_EVERY:
            save_state(state, step, vae, optimiser)
            saved = time.monotonic()
            print(f"vae {step} validation {validate(vae):.2f} dB", flush=True)


def polish(folder: Path, run: VaeRun) -> None:
    """Train the decoder alone for ``run.polish`` steps; latents stay what they are.

    One step in four sees nothing but first frames.
    """
    done = folder / "polished"
    if done.exists():
        return
    torch.manual_seed(run.seed)
    vae = build_vae()
    tensors = load_file(folder / "vae.safetensors")
    vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    vae.to(pick_device())
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    learning = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    rates = (run.rate * 0.3, run.matrix_rate * 0.3)
    optimiser = Optimiser(learning, ("conv_in", "conv_out"), *rates, 0.0)
    mean = 0.0
    for step in range(run.polish):
        index = 80_000_000 + step * 8
        clips = (
            [whole_clip(index + i, 1, square=True) for i in range(8)]
            if step % 4 == 3
            else [whole_clip(index, 9, square=True)]
        )
        batch = to_batch(clips).to(next(vae.parameters()).device)
        loss, square = vae_loss(vae, batch, 0.0, run.first)
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimiser.step(rate_at(step, run.polish, 20, 0.6))
        mean = square.item() if step == 0 else 0.98 * mean + 0.02 * square.item()
        if step % 50 == 49:
            print(f"polish {step + 1} psnr {10 * np.log10(4 / mean):.2f}", flush=True)
    unchanged = {key: value for key, value in tensors.items() if not key.startswith("model.")}
    polished = {f"model.{k}": v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    step_now = read_step(folder / "vae.safetensors")
    save_file(polished | unchanged, folder / "vae.part", metadata={"step": json.dumps(step_now)})
    (folder / "vae.part").replace(folder / "vae.safetensors")
    done.touch()
    print(f"polished: validation {validate(vae):.2f} dB", flush=True)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=VAE.steps)
    parser.add_argument("--init-from", type=Path)
    args = parser.parse_args()
    train(args.folder, replace(VAE, steps=args.steps), args.init_from)


if __name__ == "__main__":
    main()
