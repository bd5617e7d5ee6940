"""Whether anything grows: hundreds of denoising steps of a small model under tight budgets.

    python -m benchmarks.soak [--steps 500] [--every 10]

A random model of the true architecture makes one video in ``steps`` steps, in the least VRAM that
any plan needs, every block but one being read from disk at every pass. Resident set, bytes reserved
(pinned, where there is a GPU), file descriptors and threads are sampled as the steps end. Growth is
the median of the last fifth over the median of the second fifth (the first one warms up). The last
line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.run.events import Event, Progress
from penstock.engine.run.pipeline import run
from penstock.engine.run.report import PhaseReport
from penstock.engine.run.stage import Run
from penstock.profiles.plan import Plan, StreamPlan
from penstock.profiles.planner import minimum_vram_bytes
from penstock.profiles.planner import plan as make_plan
from penstock.profiles.prefetch import without_prefetch
from penstock.units import MIB

RSS_GROWTH_BYTES = 4 * MIB
"""Less than one block a hundred steps: the allocator's own unrest."""


@dataclass(frozen=True)
class Sample:
    """The process when a step has ended."""

    step: int
    rss_bytes: int
    vram_bytes: int
    ram_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Soak:
    """What was seen.

    Attributes:
        report: of the denoising phase.
        model_bytes: of the transformer's blocks.
        samples: as the steps ended.
    """

    report: PhaseReport
    model_bytes: int
    samples: tuple[Sample, ...]

    def growth(self, what: str) -> int:
        """Of an attribute of the samples, late over early."""
        values: list[float] = [getattr(sample, what) for sample in self.samples]
        fifth = max(len(values) // 5, 1)
        early, late = values[fifth : 2 * fifth], values[-fifth:]
        return round(statistics.median(late) - statistics.median(early))

    @property
    def grown(self) -> dict[str, int]:
        """What has grown, and by how much; empty if nothing has."""
        limits = {"rss_bytes": RSS_GROWTH_BYTES, "vram_bytes": 0, "ram_bytes": 0}
        limits |= {"descriptors": 0, "threads": 0}
        found = {what: self.growth(what) for what in limits}
        return {what: by for what, by in found.items() if by > limits[what]}


def soak(model: Path, steps: int, every: int = 1) -> Soak:
    """Run a job of ``steps`` steps of a text-to-video ``model``."""
    process, samples = psutil.Process(), list[Sample]()

    def listener(event: Event) -> None:
        if isinstance(event, Progress) and event.phase == "denoise" and event.step % every == 0:
            samples.append(_sample(process, event))

    request = GenerationRequest(
        prompt="a red circle moves", width=32, height=32, frames=5, steps=steps, seed=3
    )
    with Engine.open(model, device="cpu", vram="1GiB", ram="64MiB") as engine:
        job = Run(
            model=engine.model,
            request=request,
            plan=_tight(engine, request),
            device=torch.device("cpu"),
            overlapped=True,
            output=None,
            overwrite=False,
            metadata=False,
        )
        result = run(job, listener, threading.Event())
        nbytes = sum(engine.model.manifest.transformer.weights.block_bytes)
    denoise = next(phase for phase in result.report.phases if phase.name == "denoise")
    return Soak(denoise, nbytes, tuple(samples))


def _tight(engine: Engine, request: GenerationRequest) -> Plan:
    """The plan for the least VRAM there is, with all blocks but one read again at every pass."""
    manifest, workload = engine.model.manifest, workload_of(request)
    least = minimum_vram_bytes(manifest, workload, engine.hardware)
    plan = make_plan(manifest, workload, replace(engine.hardware, vram_bytes=least))
    denoise = plan["denoise"]
    assert denoise.stream is not None
    stream = StreamPlan(denoise.stream.n_blocks, 0, 1, device_slots=1, staging_buffers=1)
    return without_prefetch(plan, manifest.prefetch).with_phases((replace(denoise, stream=stream),))


def _sample(process: Any, event: Progress) -> Sample:
    descriptors = process.num_fds() if hasattr(process, "num_fds") else 0
    return Sample(
        event.step,
        process.memory_info().rss,
        event.vram_bytes,
        event.ram_bytes,
        descriptors,
        threading.active_count(),
    )


def summary(found: Soak, samples: Sequence[Sample]) -> dict[str, object]:
    """What is reported."""
    growth = {name: found.growth(name) for name in asdict(samples[0]) if name != "step"}
    return {
        "benchmark": "soak",
        "steps": found.report.units,
        "model_bytes": found.model_bytes,
        "read_bytes": found.report.read_bytes,
        "growth": growth,
        "grown": found.grown,
        "first": asdict(samples[0]),
        "last": asdict(samples[-1]),
    }


def main() -> None:
    """Run, print what has grown, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-soak-") as folder:
        model = write_tiny_model(
            Path(folder), image_to_video=False, vae={"base_dim": 8}, transformer={"num_layers": 6}
        )
        found = soak(model, arguments.steps, arguments.every)
    grown = found.grown
    print(
        f"{found.report.units} steps, {found.report.read_bytes:,} bytes read: "
        + (str(grown) or "no growth")
    )
    print(json.dumps(summary(found, found.samples)))
    raise SystemExit(1 if grown else 0)


if __name__ == "__main__":
    main()
