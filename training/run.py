"""The whole run with one command: ``python -m training.run training/runs/mini``.

Every stage resumes where it stopped.  The transformer is trained in rounds; after each the
validation score decides whether the weights are written to the output folder.
"""

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from training import encode, train_dit, train_vae
from training.common import read_step
from training.evaluate import make_pairs, score
from training.generate import Generator, Sampler
from training.models import save_folder
from training.settings import DIT, ENCODE, FPS, FRAMES, REFINE, VAE

ROUNDS = 3
"""Validations of the transformer in a run."""
GRID = tuple(Sampler(12, guidance, shift) for guidance in (1.5, 3.0, 5.0) for shift in (3.0, 5.0))
"""Sampler settings tried at the end."""


def load_run(folder: Path) -> Generator:
    """The averaged weights of a run, ready to sample."""
    model = train_dit.build_model()
    model.load_state_dict(load_file(folder / "ema.safetensors"))
    return Generator(model.eval(), model.use_biased_attention(), encode.load_vae(folder))


def export(folder: Path, output: Path, sampler: Sampler) -> None:
    """Write the run's weights as a diffusers folder."""
    model = train_dit.build_model()
    model.load_state_dict(load_file(folder / "ema.safetensors"))
    sizes = {"frames": FRAMES, "height": 64, "width": 64, "fps": FPS}
    save_folder(output, model, encode.load_vae(folder), asdict(sampler) | sizes)


def drop_stale(folder: Path) -> None:
    """Remove latents, and a transformer trained on them, of an earlier autoencoder."""
    stamp, step = folder / "encoded_from_step", str(read_step(folder / "vae.safetensors"))
    if stamp.exists() and stamp.read_text() != step:
        print(f"the autoencoder has changed since step {stamp.read_text()}: encoding again")
        later = ("statistics.json", "dit.safetensors", "ema.safetensors", "best.json")
        for file in [folder / name for name in later] + list((folder / "shards").glob("*")):
            file.unlink(missing_ok=True)
    stamp.write_text(step)


def encode_scenes(folder: Path, scenes: int) -> None:
    """Fill the shard folder up to ``scenes``."""
    drop_stale(folder)
    vae = encode.load_vae(folder)
    if not (folder / "statistics.json").exists():
        encode.measure(vae, folder)
    encode.fill(vae, folder / "shards", scenes)


def train_rounds(folder: Path, output: Path, steps: int, init_from: Path | None) -> None:
    """Train the transformer; export whenever the validation score is the best so far."""
    best_file, pairs = folder / "best.json", make_pairs("validation", 27)
    best = json.loads(best_file.read_text())["right"] if best_file.exists() else -1.0
    state = folder / "dit.safetensors"
    done = read_step(state) if state.exists() else 0
    for number in range(1, ROUNDS + 1):
        until = steps * number // ROUNDS
        if until <= done:
            continue
        train_dit.train(folder, replace(DIT, steps=steps), until, init_from)
        figures = score(load_run(folder), pairs, Sampler(), seed=until)
        print(json.dumps({"step": until} | figures), flush=True)
        right = float(str(figures["right"]))
        if right >= best:
            best = right
            best_file.write_text(json.dumps({"step": until} | figures))
            export(folder, output, Sampler())


def choose_sampler(output: Path) -> None:
    """Write the sampler settings with the best validation score to the folder."""
    from training.generate import from_folder

    generator, pairs = from_folder(output), make_pairs("validation", 27)
    scores = [float(str(score(generator, pairs, sampler, seed=1)["right"])) for sampler in GRID]
    chosen = GRID[scores.index(max(scores))]
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
    choose_sampler(args.output)


if __name__ == "__main__":
    main()
