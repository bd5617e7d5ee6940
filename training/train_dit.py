"""Stage 3: train transformer, text encoder and image encoder on the precomputed latents.

``python -m training.train_dit RUN_FOLDER`` resumes from ``RUN_FOLDER/dit.safetensors``.  New shards
are taken up while it runs.  ``--init-from FOLDER`` starts from the weights of a shipped model.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from training.common import (
    SAVE_EVERY,
    Optimiser,
    follow,
    load_state,
    pick_device,
    rate_at,
    save_state,
)
from training.models import BiasedAttention, MiniWan, build_tokenizer
from training.settings import DIT, DitRun

TURNING = ("rotates", "turns", "spins")
SYMMETRIC = ("star", "square")
"""Shapes that look alike after a small turn: theirs are the hardest to learn."""
PREFERENCE = 3.0
"""How much likelier a turn of these is drawn than one of another shape."""
OUTER = ("embed", "shared", "proj_out", "scale_shift_table", "relative_attention_bias")
"""Parts of the names of weights that are not hidden matrices."""


def build_model(init_from: Path | None = None) -> MiniWan:
    """A fresh model, or one with the weights of a diffusers folder."""
    model = MiniWan(len(build_tokenizer()))
    if init_from is not None:
        parts = (
            (model.transformer, WanTransformer3DModel, "transformer"),
            (model.text, UMT5EncoderModel, "text_encoder"),
            (model.image, CLIPVisionModel, "image_encoder"),
        )
        for module, kind, name in parts:
            loaded = kind.from_pretrained(init_from / name, torch_dtype=torch.float32)
            module.load_state_dict(loaded.state_dict())
    return model


class Shards:
    """The precomputed clips in memory, in groups of equal size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Path] = set()
        self.groups: list[dict[str, Tensor]] = []
        self.turning, self.symmetric = (_ids(words) for words in (TURNING, SYMMETRIC))

    def refresh(self) -> None:
        """Take up the shards written since the last call."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file not in self.seen:
                self.seen.add(file)
                group = load_file(file)
                varies = group["latents"].var(dim=1).mean(dim=1)  # (scenes, t, h, w)
                group["varies"] = varies / varies.mean(dim=(1, 2, 3), keepdim=True)
                self.groups.append(group)

    def draw(self, rng: torch.Generator, batch: int, turns: float) -> dict[str, Tensor]:
        """A batch of clips of one size, each with its picture's condition and pixels.

        Args:
            turns: this share of them, and more by chance, are clips that turn.
        """
        group = self.groups[int(torch.randint(len(self.groups), (), generator=rng))]
        scenes, motions = group["ids"].shape[:2]
        scene = torch.randint(scenes, (batch,), generator=rng)
        motion = torch.randint(motions, (batch,), generator=rng)
        some = round(turns * batch)
        if some:
            turning, symmetric = (
                torch.isin(group["ids"], words).any(-1) for words in (self.turning, self.symmetric)
            )
            chances = turning * torch.where(symmetric, PREFERENCE, 1.0)
            picked = torch.multinomial(chances.flatten(), some, replacement=True, generator=rng)
            chosen = torch.randperm(batch, generator=rng)[:some]  # noise levels go by place
            scene[chosen], motion[chosen] = picked // motions, picked % motions
        return {
            "latents": group["latents"][scene, motion],
            "ids": group["ids"][scene, motion].long(),
            "condition": group["condition"][scene],
            "pixels": group["pixels"][scene],
            "varies": group["varies"][scene],
        }


def _ids(words: tuple[str, ...]) -> Tensor:
    """The tokens of words, of which each is one."""
    return torch.tensor(build_tokenizer()(" ".join(words), add_special_tokens=False).input_ids)


def with_mask(condition: Tensor) -> Tensor:
    """The 20 condition channels: 4 of the mask (first frame given), 16 latent."""
    mask = torch.zeros_like(condition[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, condition], dim=1)


def flow_loss(
    model: MiniWan,
    attention: BiasedAttention,
    batch: dict[str, Tensor],
    rng: torch.Generator,
    run: DitRun,
    transformer: Callable[..., Any],
) -> Tensor:
    """Mean squared error of the predicted velocity, noise minus clip, ``run.focus`` of it weighted
    by how much a place varies between the motions of its picture.

    ``transformer`` is the model's own, or a compiled form of it.
    """
    clean = batch["latents"]
    size = clean.shape[0]
    uniform = (torch.arange(size) + torch.rand(size, generator=rng)) / size
    sigma = (run.shift * uniform / (1 + (run.shift - 1) * uniform)).to(clean.device)
    noise = torch.randn(clean.shape, generator=rng).to(clean.device)
    weight = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - weight) * clean + weight * noise
    dropped = torch.rand(size, 1, generator=rng).to(clean.device) < run.drop_prompt
    empty = torch.zeros_like(batch["ids"])
    empty[:, 0] = 1
    states, attention.text_bias = model.encode_text(torch.where(dropped, empty, batch["ids"]))
    velocity = transformer(
        torch.cat([noisy, with_mask(batch["condition"])], dim=1),
        timestep=1000 * sigma,
        encoder_hidden_states=states,
        encoder_hidden_states_image=model.encode_image(batch["pixels"]),
        return_dict=False,
    )[0]
    error = (velocity - (noise - clean)).square().mean(dim=1)
    return (error * (1 - run.focus + run.focus * batch["varies"])).mean()


def train(
    folder: Path,
    run: DitRun,
    until: int,
    init_from: Path | None = None,
    latents: Path | None = None,
) -> None:
    """Run or resume the stage until step ``until`` of the schedule of ``run.steps``.

    ``latents`` is the folder of the shards; None: ``shards`` in ``folder``.
    """
    torch.manual_seed(run.seed)
    device = pick_device()
    model = build_model(init_from).to(device)
    attention = model.use_biased_attention()
    optimiser = Optimiser(model, OUTER, run.rate, run.matrix_rate, run.weight_decay)
    state, average = folder / "dit.safetensors", folder / "ema.safetensors"
    step = load_state(state, model, optimiser)
    ema = build_model().to(device).requires_grad_(False)
    ema.load_state_dict(load_file(average) if average.exists() else model.state_dict())
    shards = Shards(latents or folder / "shards")
    fused = torch.compile(model.transformer, dynamic=False)  # for the frequent shape: minutes
    mean, began, started = 0.0, step, time.monotonic()
    saved = started
    while step < until:
        if step == began or step % 200 == 0:
            shards.refresh()
        rng = torch.Generator().manual_seed(run.seed * 1_000_000_007 + step)
        batch = {
            key: value.to(device) for key, value in shards.draw(rng, run.batch, run.turns).items()
        }
        square = batch["latents"].shape[-1] == batch["latents"].shape[-2]
        transformer = fused if square else model.transformer
        loss = flow_loss(model, attention, batch, rng, run, transformer)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimiser.step(rate_at(step, run.steps, run.warmup, run.decay))
        step += 1
        follow(ema.parameters(), model.parameters(), min(run.ema, (1 + step) / (10 + step)))
        mean = loss.item() if step == began + 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step - began)
            print(f"dit {step} loss {mean:.4f} {pace:.3f} s/step", flush=True)
        if step == until or time.monotonic() - saved > SAVE_EVERY:
            save_file({k: v.clone() for k, v in ema.state_dict().items()}, average)
            save_state(state, step, model, optimiser)
            saved = time.monotonic()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=DIT.steps)
    parser.add_argument("--init-from", type=Path)
    args = parser.parse_args()
    train(args.folder, replace(DIT, steps=args.steps), args.steps, args.init_from)


if __name__ == "__main__":
    main()
