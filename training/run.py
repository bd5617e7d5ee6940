"""The whole run with one command: ``python -m training.run training/runs/mini``.

Every stage resumes where it stopped.  The transformer is trained in rounds; after each the
validation score decides whether the weights are written to the output folder.
"""

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training import encode, train_dit, train_vae
from training.common import read_step
from training.evaluate import make_pairs, score
from training.generate import Generator, Sampler
from training.models import save_folder
from training.settings import DIT, ENCODE, FPS, FRAMES, REFINE, TURNS, VAE

ROUNDS = 3
"""Validations of the transformer in a run."""
GRID = tuple(Sampler(12, guidance, shift) for guidance in (3.0, 4.0, 5.0) for shift in (3.0, 5.0))
"""Sampler settings tried at the end."""


def load_run(folder: Path, average: Path) -> Generator:
    """The averaged weights of a transformer and a run's autoencoder, ready to sample."""
    model = train_dit.build_model()
    model.load_state_dict(load_file(average))
    return Generator(model.eval(), model.use_biased_attention(), encode.load_vae(folder))


def export(folder: Path, average: Path, output: Path, sampler: Sampler) -> None:
    """Write averaged weights and a run's autoencoder as a diffusers folder."""
    model = train_dit.build_model()
    model.load_state_dict(load_file(average))
    sizes = {"frames": FRAMES, "height": 64, "width": 64, "fps": FPS}
    # Training drops the prompt to an empty one: the official negative prompt means nothing here,
    # and its pictures reach CLIP as the processor of CLIP makes them.
    defaults = asdict(sampler) | sizes | {"negative_prompt": "", "clip_crop": "center"}
    save_folder(output, model, encode.load_vae(folder), defaults)


def drop_stale(folder: Path) -> None:
    """Remove latents, and a transformer trained on them, of an earlier autoencoder."""
    stamp, step = folder / "encoded_from_step", str(read_step(folder / "vae.safetensors"))
    if stamp.exists() and stamp.read_text() != step:
        print(f"the autoencoder has changed since step {stamp.read_text()}: encoding again")
        later = ("statistics.json", "dit.safetensors", "ema.safetensors", "best.json")
        made = [*(folder / "shards").glob("*"), *(folder / "turns").glob("*")]
        for file in [*(folder / name for name in later), *made]:
            file.unlink(missing_ok=True)
    stamp.write_text(step)


def encode_scenes(folder: Path, scenes: int) -> None:
    """Fill the shard folder up to ``scenes``."""
    drop_stale(folder)
    vae = encode.load_vae(folder)
    if not (folder / "statistics.json").exists():
        encode.measure(vae, folder)
    encode.fill(vae, folder / "shards", scenes)


def keep_best(folder: Path, average: Path, output: Path, step: int) -> None:
    """Export the averaged weights if their validation score is the best so far."""
    best_file, pairs = folder / "best.json", make_pairs("validation", 45)
    figures = {"step": step} | score(load_run(folder, average), pairs, Sampler(), seed=1)
    print(json.dumps(figures), flush=True)
    best = json.loads(best_file.read_text()) if best_file.exists() else {}
    if _rank(figures) >= _rank(best):
        best_file.write_text(json.dumps(figures))
        export(folder, average, output, Sampler())


def _rank(figures: dict[str, Any]) -> float:
    """Both gates count."""
    return float(figures.get("right", -1)) + float(figures.get("opposite", -1))


def train_rounds(folder: Path, output: Path, steps: int, init_from: Path | None) -> None:
    """Train the transformer; export whenever the validation score is the best so far."""
    state = folder / "dit.safetensors"
    done = read_step(state) if state.exists() else 0
    for number in range(1, ROUNDS + 1):
        until = steps * number // ROUNDS
        if until > done:
            train_dit.train(folder, replace(DIT, steps=steps), until, init_from)
            keep_best(folder, folder / "ema.safetensors", output, until)


def train_turns(folder: Path, output: Path) -> None:
    """From the best weights on, with more clips that turn; exported if that is better."""
    turns = folder / "turns"
    state = turns / "dit.safetensors"
    if state.exists() and read_step(state) == TURNS.steps:
        return
    turns.mkdir(exist_ok=True)
    train_dit.train(turns, TURNS, TURNS.steps, output, folder / "shards")
    keep_best(folder, turns / "ema.safetensors", output, TURNS.steps)


def choose_sampler(output: Path) -> None:
    """Write the sampler settings with the best validation score to the folder."""
    from training.generate import from_folder

    generator, pairs = from_folder(output), make_pairs("validation", 45)
    chosen = max(GRID, key=lambda sampler: _rank(score(generator, pairs, sampler, seed=1)))
    defaults = output / "defaults.json"
    values = json.loads(defaults.read_text()) | asdict(chosen)
    defaults.write_text(json.dumps(values, indent=2) + "\n")
    scheduler = output / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"flow_shift": chosen.shift}
    scheduler.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("penstock/assets/mini"))
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--dit-steps", type=int, default=DIT.steps)
    parser.add_argument("--scenes", type=int, default=ENCODE.scenes)
    parser.add_argument("--init-from", type=Path, help="start from the weights of this folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = VAE if args.init_from is None else REFINE
    train_vae.train(args.folder, replace(run, steps=args.vae_steps or run.steps), args.init_from)
    train_vae.polish(args.folder, run)
    encode_scenes(args.folder, args.scenes)
    train_rounds(args.folder, args.output, args.dit_steps, args.init_from)
    train_turns(args.folder, args.output)
    choose_sampler(args.output)


if __name__ == "__main__":
    main()
