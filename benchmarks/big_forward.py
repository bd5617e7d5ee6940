"""A 16.4 B-parameter model does a denoising forward in a process that stays under 3 GiB.

    python -m benchmarks.big_forward [--folder DIR] [--blocks 40] [--format int8]

Wan2.1 I2V 14B at its true widths with random 8-bit weights (17 GB) is written to ``--folder`` block
by block and removed again. Three processes of their own then work with the file: one writes it, one
runs a job's phases on it (cross-attention K/V, then one denoising step) under byte budgets with
everything streamed from disk, one runs the same blocks one by one, each loaded when its turn comes.
The results are compared bit by bit; memory is what the kernel says of each process (VmHWM), code
and libraries included. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.engine import Engine
from penstock.engine.families.wan import forward as dit
from penstock.engine.model.component import Component
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.pipeline import work_of
from penstock.engine.run.sampling import Sampling
from penstock.engine.run.stage import Stage
from penstock.offload.layout import BlockLayout
from penstock.offload.streamer import load_block
from penstock.profiles.caching import Caching
from penstock.profiles.manifest import SCRATCH
from penstock.profiles.options import Options

LIMIT_BYTES = 3 << 30
SIZE, FRAMES = 256, 5
CHUNK_TOKENS = 512
NAME = "wan2.1-i2v-14b"


def main() -> None:
    """Run one role, or all of them in processes of their own."""
    options = parse()
    if options.role is not None:
        print(json.dumps(ROLES[options.role](options, Path(options.folder)) | memory()))
        return
    if options.reuse is not None:
        found = {role: child(options, role, options.reuse) for role in ROLES}
    else:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-big-") as folder:
            found = {role: child(options, role, folder) for role in ROLES}
    report = summary(options, found)
    print(json.dumps(report))
    if not (report["identical"] and report["under_limit"]):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A forward of a model larger than the memory")
    parser.add_argument("--folder", default=None, help="where 17 GB are written")
    parser.add_argument("--reuse", default=None, help="a folder whose model is there, and stays")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--vram", default="1850MiB", help="of the device tier (here RAM as well)")
    parser.add_argument("--ram", default="400MiB")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--role", choices=list(ROLES), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace, role: str, folder: str) -> dict[str, Any]:
    """What a process that plays ``role`` reports."""
    flags = ["--role", role, "--folder", folder, "--blocks", str(options.blocks)]
    flags += ["--format", options.format, "--vram", options.vram, "--ram", options.ram]
    command = [sys.executable, "-m", "benchmarks.big_forward", *flags, "--name", options.name]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report["process_s"] = time.perf_counter() - started
    print(f"{role}: {report['process_s']:.1f} s, {report['peak_bytes'] / 2**30:.2f} GiB")
    return report


def memory() -> dict[str, int]:
    """Peak resident memory of this process, by two accounts of the kernel."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "peak_bytes": int(line.split()[1]) << 10,
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def write(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model."""
    logging.disable_progress_bar()
    started, model = time.perf_counter(), folder / "model"
    if not model.exists():
        write_synthetic(model, options.name, blocks=options.blocks, weight_format=options.format)
    nbytes = sum(path.stat().st_size for path in (model / "transformer").iterdir())
    return {"seconds": time.perf_counter() - started, "bytes": nbytes}


def stream(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A denoising step on the job's own path."""
    base_bytes = memory()["peak_bytes"]
    with Engine.open(
        folder / "model",
        vram=options.vram,
        ram=options.ram,
        device="cpu",
        options=Options(chunk_tokens=str(CHUNK_TOKENS), disk="auto", residual="bf16"),
    ) as engine:
        parameters = engine.model.streamed.source.parameters
        started = time.perf_counter()
        result = measure(engine, Asked(request(), 0, options.name), sample_bytes=256 << 20)
        seconds = time.perf_counter() - started
    return {
        "base_bytes": base_bytes,
        "parameters": parameters,
        "seconds": seconds,
        "latents_sha256": result.latents_sha256,
        "placement": result.placement,
        "ledgers_bytes": max(p.ledger_vram_bytes + p.ledger_ram_bytes for p in result.phases),
        "planned_bytes": max(p.predicted_vram_bytes + p.predicted_ram_bytes for p in result.phases),
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "read_bytes": phase.read_bytes,
                "read_gb_per_s": phase.read_bytes_per_s / 1e9,
                "stall_s": phase.stall_s,
            }
            for phase in result.phases
        },
        "direct_read_gb_per_s": result.links.read_bytes_per_s / 1e9,
    }


def one_by_one(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same step with a plain loop: no ring, no threads, no plan; each block loaded for its
    turn, and its cross-attention K/V computed there and then."""
    with (
        Engine.open(folder / "model", vram="64GiB", ram="64GiB", device="cpu") as engine,
        torch.no_grad(),
    ):
        asked, component = request(), engine.model.streamed
        plan = engine.plan(asked)
        stage = Stage(engine.run_of(asked, plan), lambda event: None, threading.Event())
        scratch_bytes = dict(plan["denoise"].work).get(SCRATCH, 0)
        drawn, sampling = work_of(stage).drawn(stage), Sampling(stage)
        started = time.perf_counter()
        with stage.rest(component) as model, stage.model.scratch.held(scratch_bytes):
            every = range(stage.job.request.steps)
            sampler, cache = sampling.resume(every, Caching())
            text, image, condition = drawn["texts"][0], drawn["image"], drawn["condition"]
            context = dit.prepare_context(model, text, image)
            step = dit.step_modulation(model, sampler.timesteps, component.dtype)[0]
            rope = dit.rope_tables(model, sampling.latents.shape[2:], stage.device)
            whole = torch.cat([sampling.latents, condition], dim=1).to(component.dtype)
            hidden = dit.embed(model, whole)
            kv = dit.SelfKV(hidden, model.config.num_attention_heads)
            for index in range(len(component.blocks)):
                with loaded(stage, component, component.cross[index], index) as block:
                    cross = dit.cross_kv(block.attn2, context)
                with loaded(stage, component, component.blocks[index], index) as block:
                    dit.block_forward(block, hidden, step, cross, rope, kv, CHUNK_TOKENS)
            prediction = dit.head(model, hidden, step.temb, whole.shape[2:], CHUNK_TOKENS)
        latents = sampling.step(sampler, cache, prediction, sampling.latents)
        digest = hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()
    return {"seconds": time.perf_counter() - started, "latents_sha256": digest}


@contextmanager
def loaded(stage: Stage, component: Component, layout: BlockLayout, index: int) -> Iterator[Any]:
    """One block with its weights, which are gone afterwards."""
    with (
        load_block(
            layout,
            device=stage.device,
            device_ledger=stage.device_ledger,
            host_ledger=stage.host_ledger,
        ) as tensors,
        component.bound(tensors, index) as block,
    ):
        yield block


def request() -> GenerationRequest:
    """One step without guidance on a few hundred tokens."""
    return GenerationRequest(
        prompt="a benchmark",
        image=Path("not opened: the conditions are drawn"),
        width=SIZE,
        height=SIZE,
        frames=FRAMES,
        steps=1,
        guidance_scale=1.0,
        seed=0,
    )


ROLES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "write": write,
    "stream": stream,
    "one_by_one": one_by_one,
}


def summary(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the three processes say together."""
    streamed, alone = found["stream"], found["one_by_one"]
    return {
        "benchmark": "big_forward",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "model": f"{options.name}, {options.blocks} blocks, {options.format}",
        "parameters": streamed["parameters"],
        "file_bytes": found["write"]["bytes"],
        "tokens": (1 + (FRAMES - 1) // 4) * (SIZE // 16) ** 2,
        "budgets": {"vram": options.vram, "ram": options.ram},
        "identical": streamed["latents_sha256"] == alone["latents_sha256"],
        "limit_bytes": LIMIT_BYTES,
        "under_limit": streamed["peak_bytes"] < LIMIT_BYTES,
        "peak_gib": round(streamed["peak_bytes"] / 2**30, 3),
        **found,
    }


if __name__ == "__main__":
    main()
