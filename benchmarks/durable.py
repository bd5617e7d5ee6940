"""What keeping a job costs: a save of the 720p state, and its share of the small job.

    python benchmarks/durable.py [--folder DIR] [--rounds N]

The last line on stdout is JSON. A save runs beside the next step: it adds to a step only what is
copied before, and all of it only where it takes longer than the step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.keeper import JournalKeeper
from penstock.engine.store.journal import Journal

LATENTS_720P = (1, 16, 21, 90, 160)
STATE_TENSORS = 4
"""UniPC of order 2: the latents, two predictions and the last sample."""


def save_seconds(folder: Path, rounds: int) -> tuple[float, int]:
    """Median seconds of one save of the 720p state, and its bytes."""
    state = {str(index): torch.randn(LATENTS_720P) for index in range(STATE_TENSORS)}
    nbytes = sum(tensor.nbytes for tensor in state.values())
    seconds = []
    with Journal.create(folder / "720p", {}, {}, {}, reserve_bytes=3 * nbytes) as journal:
        for step in range(rounds + 2):
            begun = time.perf_counter()
            journal.save_step(step, state, {})
            seconds.append(time.perf_counter() - begun)
    return sorted(seconds[2:])[rounds // 2], nbytes


KEEPING = ("save_conditions", "save_point", "settle", "save_latents", "save_tile",
           "writing_output", "finished")  # fmt: skip


def kept_job_seconds(folder: Path, rounds: int) -> tuple[float, float]:
    """Seconds of the small job with a job directory, and those of them spent on keeping it.

    Keeping is what happens on the job's own thread (copies of the state, waiting for the disk) and
    the making of the directory. Both come from one run, so that other load on the machine stretches
    them alike; of the rounds, the one with the median share is told.
    """
    model = write_tiny_model(folder / "model", image_to_video=False)
    request = GenerationRequest(
        prompt="a red circle moves", width=128, height=128, frames=9, steps=12, seed=0
    )
    shares = []
    with Engine.open(model, device="cpu", vram="400MiB", ram="400MiB") as engine:
        engine.submit(request).result()
        for number in range(rounds):
            clock = Clock()
            begun = time.perf_counter()
            with clock.watching():
                job = engine.submit(request, job_dir=folder / f"job{number}")
                making_s = time.perf_counter() - begun
                job.result()
            shares.append((time.perf_counter() - begun, clock.seconds + making_s))
    return sorted(shares, key=lambda pair: pair[1] / pair[0])[rounds // 2]


class Clock:
    """Seconds that the job's thread spends in the methods `KEEPING` of its keeper."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count while the context lasts."""
        originals = {name: getattr(JournalKeeper, name) for name in KEEPING}
        for name, original in originals.items():
            setattr(JournalKeeper, name, self._timed(original))
        yield
        for name, original in originals.items():
            setattr(JournalKeeper, name, original)

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun, self._depth = time.perf_counter(), self._depth + 1
            try:
                return original(*arguments)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - begun

        return call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        save_s, nbytes = save_seconds(Path(scratch), arguments.rounds)
        job_s, keeping_s = kept_job_seconds(Path(scratch), arguments.rounds)
    print(
        json.dumps(
            {
                "state_720p_bytes": nbytes,
                "save_720p_s": round(save_s, 4),
                "save_bytes_per_s": round(nbytes / save_s),
                "shortest_720p_step_s_for_1_percent": round(100 * save_s, 1),
                "small_job_s": round(job_s, 4),
                "small_job_keeping_s": round(keeping_s, 4),
                "small_job_keeping_share": round(keeping_s / (job_s - keeping_s), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
