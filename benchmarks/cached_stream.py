"""A job with a step cache whose blocks stream from disk: what it reads, and whether it waits.

    python -m benchmarks.cached_stream [--blocks 2] [--steps 8] [--rounds 1] [--folder DIR]

A model with the widths of Wan2.1 14B and few blocks is made in int8 in a folder that is removed
again, and its denoising run in turn without a cache, with ``plan:N`` of half the steps, and with a
budget that skips what it can; all blocks are read from disk at every pass. Bytes that should be
read are those of the full run, by the share of the forwards. Times are of all steps but the
first, which is a cold start, and so is the share of forwards beside them. A stall is a wait of the
computation for a block; beside it stands that of a forward without a cache. The last line on
stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.result import BenchResult
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Event, Progress
from penstock.profiles.caching import Caching
from penstock.profiles.plan import StreamPlan
from penstock.units import GIB

MODEL = "wan2.1-i2v-14b"


def main() -> None:
    """Measure, print a table, and the same as JSON."""
    parser = argparse.ArgumentParser(description="A cached job that streams from disk")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="where the model is written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ways = ("off", f"plan:{asked.steps // 2}", "budget:1")
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="penstock-cached-") as folder:
        model = write_synthetic(Path(folder), MODEL, blocks=asked.blocks, weight_format="int8")
        picture = Path(folder) / "picture.png"
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(picture)
        runs: dict[str, list[tuple[BenchResult, float]]] = {way: [] for way in ways}
        for _ in range(asked.rounds):
            for way in ways:
                runs[way].append(one(model, picture, asked.steps, way))
    results = {way: [result for result, _ in runs[way]] for way in ways}
    cpu_s = {way: statistics.median(seconds for _, seconds in runs[way]) for way in ways}
    rows = [
        row(way, results[way], results["off"]) | {"cpu_s_over_full": cpu_s[way] / cpu_s["off"]}
        for way in ways
    ]
    for each in rows:
        print(each, flush=True)
    print(
        json.dumps(
            {
                "benchmark": "cached_stream",
                "model": f"{MODEL}, {asked.blocks} blocks in int8",
                "steps": asked.steps,
                "machine": f"{platform.platform()}, {os.cpu_count()} cores",
                "rows": rows,
            }
        )
    )


def one(model: Path, picture: Path, steps: int, way: str) -> tuple[BenchResult, float]:
    """One run of the denoising under ``way``, and the CPU seconds of the process from the end of
    the first step, which is a cold start, to that of the last."""
    request = GenerationRequest(
        prompt="a benchmark", image=picture, width=64, height=64, frames=5, steps=steps, seed=0
    )
    with Engine.open(
        model, device="cpu", vram=3 * GIB, ram=4 * GIB, format="int8", step_cache=way, branches="1"
    ) as engine:
        plan = engine.plan(request)
        denoise = plan["denoise"]
        assert denoise.stream is not None
        from_disk = StreamPlan(denoise.stream.n_blocks, 0, 0, device_slots=2, staging_buffers=1)
        plan = plan.with_phases((replace(denoise, stream=from_disk),))
        marks: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, Progress) and event.phase == "denoise":
                marks.append(time.process_time())

        found = measure(engine, Asked(request, 0, name=MODEL), listen, plan=plan)
        return found, marks[-1] - marks[0]


def row(way: str, runs: list[BenchResult], full: list[BenchResult]) -> dict[str, Any]:
    """What a way did, medians of the rounds."""
    steps = len(full[0].steps)
    copied, all_copied = (sum(s.copied_bytes for s in each[0].steps) for each in (runs, full))
    forwards = Caching.of(way).planned or round(steps * copied / all_copied)
    share = forwards / steps
    read, whole = (
        statistics.median(sum(step.read_bytes for step in run.steps) for run in each)
        for each in (runs, full)
    )
    seconds, all_seconds = (
        statistics.median(sum(step.seconds for step in run.steps[1:]) for run in each)
        for each in (runs, full)
    )
    stalls, all_stalls = (
        statistics.median(sum(step.stall_s for step in run.steps[1:]) for run in each)
        for each in (runs, full)
    )
    return {
        "cache": way,
        "forwards": forwards,
        "read_bytes": int(read),
        "saved_of_expected": None if share == 1 else (whole - read) / (whole * (1 - share)),
        "forwards_over_full": (forwards - 1) / (steps - 1),
        "seconds_over_full": seconds / all_seconds,
        "stall_s_a_forward": stalls / forwards,
        "stall_s_a_forward_full": all_stalls / steps,
    }


if __name__ == "__main__":
    main()
