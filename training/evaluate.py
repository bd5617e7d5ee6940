"""The score of the small model on held-out pictures and prompts.

``python -m training.evaluate penstock/assets/mini`` prints the share of clips in which the asked
motion happens, per motion, the same for the opposite prompts, and the PSNR gates.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from training.clips import (
    MOTIONS,
    OPPOSITE,
    Motion,
    Scene,
    caption,
    fits,
    possible_motions,
    random_scene,
    render,
    rng_for,
)
from training.generate import Sampler, default_sampler, from_folder
from training.score import Verdict, judge, psnr
from training.train_vae import validate

BATCH = 8


@dataclass(frozen=True)
class Pair:
    """A held-out picture, what is asked of it and, where there is one, the opposite."""

    scene: Scene
    motion: Motion
    prompt: str
    opposite: str | None


def make_pairs(split: str, count: int) -> list[Pair]:
    """``count`` pairs that go round the motions; the opposite motion fits the picture as well."""
    pairs: list[Pair] = []
    index = 0
    while len(pairs) < count:
        rng = rng_for(split, index)
        index += 1
        scene = random_scene(rng)
        kind = MOTIONS[len(pairs) % len(MOTIONS)]
        chosen = [motion for motion in possible_motions(scene) if motion.kind == kind]
        if not chosen:
            continue
        motion = chosen[int(rng.integers(len(chosen)))]
        other = Motion(OPPOSITE[kind], motion.speed) if kind in OPPOSITE else None
        if other is not None and not fits(scene, other):
            continue
        opposite = caption(rng, scene, other) if other else None
        pairs.append(Pair(scene, motion, caption(rng, scene, motion), opposite))
    return pairs


def _rate(verdicts: list[Verdict]) -> float:
    """Share of the verdicts that are right."""
    return float(np.mean([verdict.right for verdict in verdicts])) if verdicts else float("nan")


class MakesClips(Protocol):
    """Pictures (h, w, 3) and prompts to clips (b, frames, h, w, 3), all in [0, 1]."""

    def __call__(
        self, pictures: list[np.ndarray], prompts: list[str], sampler: Sampler, seed: int
    ) -> np.ndarray:
        """One clip a pair of picture and prompt."""


def score(
    generator: MakesClips, pairs: list[Pair], sampler: Sampler, seed: int
) -> dict[str, object]:
    """Shares right with the prompt and with its opposite, and first-frame PSNR in dB."""
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    opposites: list[Verdict] = []
    first: list[float] = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        pictures = [render(pair.scene, frames=1)[0] for pair in part]
        clips = generator(pictures, [pair.prompt for pair in part], sampler, seed + start)
        for pair, picture, clip in zip(part, pictures, clips, strict=True):
            verdicts[pair.motion.kind].append(judge(clip, pair.scene, pair.motion))
            first.append(psnr(clip[0], picture))
        turned = [
            (pair, picture) for pair, picture in zip(part, pictures, strict=True) if pair.opposite
        ]
        if not turned:
            continue
        asked = [pair.opposite or "" for pair, _ in turned]
        clips = generator([picture for _, picture in turned], asked, sampler, seed + start)
        for (pair, _), clip in zip(turned, clips, strict=True):
            wanted = Motion(OPPOSITE[pair.motion.kind], pair.motion.speed)
            opposites.append(judge(clip, pair.scene, wanted))
    every = [verdict for group in verdicts.values() for verdict in group]
    return {
        "pairs": len(pairs),
        "right": _rate(every),
        "motion": float(np.mean([verdict.motion for verdict in every])),
        "colour": float(np.mean([verdict.colour for verdict in every])),
        "background": float(np.mean([verdict.background for verdict in every])),
        "opposite": _rate(opposites),
        "first_frame_psnr": float(np.mean(first)),
        "per_motion": {kind: _rate(group) for kind, group in verdicts.items()},
    }


def main() -> None:
    """Command line: print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(Sampler):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))
    args = parser.parse_args()
    flags = {field.name: getattr(args, field.name) for field in fields(Sampler)}
    given = {name: value for name, value in flags.items() if value is not None}
    sampler = replace(default_sampler(args.folder), **given)
    generator = from_folder(args.folder)
    figures = score(generator, make_pairs(args.split, args.pairs), sampler, args.seed)
    figures["vae_psnr"] = validate(generator.vae, 48, args.split)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
