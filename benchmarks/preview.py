"""What previews and cancelling cost.

    python -m benchmarks.preview [--rounds N]

The last line on stdout is JSON. Jobs with a preview at every step are measured beside the same jobs
without, turn by turn, in CPU seconds of the job's own thread; a preview of the size of 720p by
itself; and the time from `Job.cancel`, at random moments, to the end of the job, when all is given
back.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.latent_rgb import BIAS, FACTORS
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Notice
from penstock.engine.run.preview import Previewer, RgbMap

LATENTS_720P = (1, 16, 21, 90, 160)
TFLOP_720P_STEP = 2 * 6540
"""Of both CFG branches, 720x1280x81, Wan2.1 14B: a step takes at least this many seconds on a
device of one TFLOP/s."""


def preview_seconds(rounds: int) -> float:
    """Median seconds of one preview at the size of 720p."""
    previewer = Previewer()
    previewer.use(RgbMap(torch.tensor(FACTORS), torch.tensor(BIAS), "published"))
    latents, prediction = torch.randn(2, *LATENTS_720P)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        previewer.make(latents, prediction, 0.5)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def job_seconds(engine: Engine, request: GenerationRequest, every: int | None) -> float:
    """CPU seconds of the denoising of one job: other load on the machine does not count."""
    marks: list[float] = []
    engine.submit(
        request, preview_every=every, on_step=lambda *_: marks.append(time.thread_time())
    ).result()
    return marks[-1] - marks[0]


def cancel_seconds(engine: Engine, request: GenerationRequest, moments: int) -> list[float]:
    """Seconds from `Job.cancel` at random moments to the end of the job."""
    begun = time.perf_counter()
    engine.submit(request).result()
    whole, rng, ended = time.perf_counter() - begun, random.Random(0), []
    for _ in range(moments):
        job = engine.submit(request)
        time.sleep(rng.uniform(0, whole))
        begun = time.perf_counter()
        job.cancel()
        job.wait()
        if any(isinstance(event, Notice) for event in job.events()):  # it was not done already
            ended.append(time.perf_counter() - begun)
    return ended


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    request = GenerationRequest("a red circle", width=128, height=128, frames=9, steps=8, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_model(Path(scratch), image_to_video=False)
        with Engine.open(model, device="cpu", vram="400MiB", ram="400MiB") as engine:
            job_seconds(engine, request, 1)
            pairs = [
                (job_seconds(engine, request, None), job_seconds(engine, request, 1))
                for _ in range(arguments.rounds)
            ]
            ended = cancel_seconds(engine, request, 4 * arguments.rounds)
    preview_s = preview_seconds(20 * arguments.rounds)
    print(
        json.dumps(
            {
                "denoising_with_previews_over_without": round(
                    statistics.median(with_ / without for without, with_ in pairs), 4
                ),
                "preview_720p_s": round(preview_s, 5),
                "step_720p_s_on_100_tflops": round(TFLOP_720P_STEP / 100, 1),
                "preview_share_of_that_step": round(preview_s * 100 / TFLOP_720P_STEP, 7),
                "cancel_to_end_s_median": round(statistics.median(ended), 4),
                "cancel_to_end_s_max": round(max(ended), 4),
                "cancelled_jobs": len(ended),
            }
        )
    )


if __name__ == "__main__":
    main()
