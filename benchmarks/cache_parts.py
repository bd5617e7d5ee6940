"""Two transformers under a plan of so many forwards: how many of them each should have.

    python -m benchmarks.cache_parts [--pairs N] [--save FILE.json]

The trained small model stands for both transformers of Wan2.2 A14B: at the step where the second
one would take over, a cache forgets what it knew. Of each row the forwards are shared out once by
steps, and once as a job does (`penstock.engine.run.stepplan.shared_forwards`); the schedules are
made from the record in the box. PSNR of frames against the full run, of the mean squared error of
all held-out clips and of the worst clip.

``--save`` writes the rows. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.caches import GUIDANCE, MINI, Clips, levels_of, new_sampler, plain, psnr, skipping
from penstock.engine.run.stepcache import Planned, shares_of
from penstock.engine.run.stepplan import (
    Recorded,
    Schedule,
    best_schedule,
    left_of_errors,
    shared_forwards,
)

MODELS = {"T2V": (12.0, 0.875), "I2V": (5.0, 0.9)}
"""Of Wan2.2 A14B: flow shift, and the noise from which the first transformer computes."""


@dataclass(frozen=True)
class Row:
    """Both ways to share out ``forwards``; decibels of the mean and of the worst clip.

    Attributes:
        first: steps of the first transformer.
        by_steps, by_loss: its forwards.
    """

    model: str
    steps: int
    first: int
    forwards: int
    by_steps: int
    by_loss: int
    by_steps_db: tuple[float, float]
    by_loss_db: tuple[float, float]


def measure(clips: Clips, model: str, steps: int, share: float, pictures: Tensor) -> Row:
    """Measure a row against the full run's ``pictures``."""
    shift, boundary = MODELS[model]
    levels = levels_of(steps, shift)
    left = left_of_errors(levels, shares_of(new_sampler(steps, shift)))
    first, forwards = sum(level >= boundary for level in levels), round(share * steps)
    parts = range(first), range(first, steps)
    by_loss, _ = shared_forwards(levels, parts, forwards)
    by_steps = round(forwards * first / steps)

    def found(own: int) -> tuple[float, float]:
        made = [
            best_schedule(Recorded.built_in().at(levels[part.start : part.stop]),
                          left[part.start : part.stop], count)
            for part, count in zip(parts, (own, forwards - own), strict=True)
        ]  # fmt: skip
        computed = made[0].computed + tuple(first + step for step in made[1].computed)
        rule = partial(Planned, Schedule(computed, made[0].damping + made[1].damping))
        latents = skipping(clips, steps, rule, starts=(first,))
        return psnr(clips.frames(latents), pictures, 1.0)

    return Row(
        model, steps, first, forwards, by_steps, by_loss, found(by_steps), found(by_loss)
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Forwards of two transformers under a plan")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[Row]()
    for model, steps in (("T2V", 40), ("I2V", 40), ("I2V", 20)):
        clips = Clips.of("test", asked.pairs, MODELS[model][0])
        pictures = clips.frames(plain(clips, steps))
        for share in (0.5, 0.35, 0.25):
            rows.append(measure(clips, model, steps, share, pictures))
            print(rows[-1], flush=True)
    recipe = {"model": MINI.name, "pairs": asked.pairs, "guidance": GUIDANCE}
    told = json.dumps({"recipe": recipe, "rows": [asdict(row) for row in rows]})
    if asked.save is not None:
        asked.save.write_text(told + "\n", encoding="utf-8")
    print(told)


if __name__ == "__main__":
    main()
