"""The blocks of MiniMax-H3 do a denoising forward in a process that stays under 4 GiB: 20 of its 33
B parameters, since no forward reads the others.

    python -m benchmarks.big_h3 [--folder DIR] [--blocks 50] [--format int8]

The transformer at its true widths with random weights in 8 bits (21 GB) is written to ``--folder``
and removed again; only the time embedding is narrow, so that the AdaLN projections, which no
forward reads, do not fill the disk: the step's tables are drawn, at their true size. Three
processes of their own then work with the file: one writes it, one streams every block from the disk
through a job's own rings under byte budgets, one loads the same blocks one by one when their turn
comes. The results are compared bit by bit; memory is what the kernel says of each process (VmHWM),
code and libraries included. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.big_forward import memory
from penstock.engine.bench.weights import write_streamed
from penstock.engine.families.minimax_h3.config import MODALITIES
from penstock.engine.families.minimax_h3.forward import angles, packed_forward
from penstock.engine.families.minimax_h3.kinds import TRANSFORMER
from penstock.engine.families.minimax_h3.layout import Layout
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.structure import ENDS
from penstock.engine.families.minimax_h3.tables import StepTables, StepTimes
from penstock.engine.files.locate import open_component
from penstock.engine.model.component import Component, component_of
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Residency
from penstock.offload.streamer import BlockStream, load_block
from penstock.quant.paths import Computing, Scratch

LIMIT_BYTES = 4 << 30
CPU = torch.device("cpu")
LAYOUT = Layout(Latents(3, 12, 16, 21), (1,) * 64)
CHUNK_ROWS = 512
TIME_WIDTH = 64


def main() -> None:
    """Run one role, or all of them in processes of their own."""
    options = parse()
    if options.role is not None:
        print(json.dumps(ROLES[options.role](options, Path(options.folder)) | memory()))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-h3-") as folder:
        found = {role: child(options, role, folder) for role in ROLES}
    report = summary(options, found)
    print(json.dumps(report))
    if not (report["identical"] and report["under_limit"]):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A forward of MiniMax-H3's blocks")
    parser.add_argument("--folder", default=None, help="where 21 GB are written")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--format", default="int8", choices=["int8", "fp8"])
    parser.add_argument("--role", choices=list(ROLES), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace, role: str, folder: str) -> dict[str, Any]:
    """What a process that plays ``role`` reports."""
    flags = ["--role", role, "--folder", folder, "--blocks", str(options.blocks)]
    command = [sys.executable, "-m", "benchmarks.big_h3", *flags, "--format", options.format]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{role}: {report['seconds']:.1f} s, {report['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    return report


def write(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the transformer."""
    started = time.perf_counter()
    config = dict(TRANSFORMER.defaults) | {
        "num_layers": options.blocks, "time_embed_dim": TIME_WIDTH, "num_refiner_layers": 1,
    }  # fmt: skip
    path = write_streamed(folder / "transformer", TRANSFORMER, config, options.format)
    return {"seconds": time.perf_counter() - started, "bytes": path.stat().st_size}


def opened(folder: Path) -> tuple[Component, Scratch, int]:
    """The transformer, what its weights are decoded in, and the bytes of that."""
    component = component_of(open_component(folder / "transformer"), only=ENDS)
    computing = Computing(Scratch(0, CPU))
    component.install(computing)
    stored = component.storage(computing, lambda name: not name.startswith("adaln_proj."))
    return component, computing.scratch, stored.scratch_bytes


def forward(component: Component, model: Any, blocks: Iterable[tuple[int, Any]]) -> str:
    """One pass over rows that are drawn; a digest of what is predicted."""
    draw, config = torch.Generator().manual_seed(0), component.config
    width, layers = config["hidden_size"], len(component.blocks)
    times = StepTimes.of(0.3, 0.6, pictures=False)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw).mul_(scale)

    rows = MODALITIES * len(times.values)
    made = [drawn(6, rows, width, scale=0.1).to(component.dtype) for _ in range(layers)]
    tables = StepTables(
        times, torch.stack(made), drawn(2, len(times.values), width).to(component.dtype)
    )
    del made
    video, sound = packed_forward(
        model,
        blocks,
        LAYOUT,
        drawn(1, len(LAYOUT.tags), width).to(component.dtype),
        drawn(LAYOUT.latents.video_rows, 4 * config["in_channels"]),
        drawn(LAYOUT.latents.sound_rows, config["audio_in_channels"]),
        tables,
        angles(model, LAYOUT.positions(), CPU, component.dtype),
        CHUNK_ROWS,
    )
    assert video.isfinite().all()
    assert sound.isfinite().all()
    return hashlib.sha256(video.numpy().tobytes() + sound.numpy().tobytes()).hexdigest()


@torch.no_grad()
def stream(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every block from the disk, read and copied beside the computation."""
    component, scratch, scratch_bytes = opened(folder)
    device, host = ByteLedger("VRAM", 2 << 30), ByteLedger("RAM", 1 << 30)
    started = time.perf_counter()
    with ExitStack() as stack:
        model = stack.enter_context(_ends(component, device, host))
        stack.enter_context(scratch.held(scratch_bytes))
        residency = Residency(len(component.blocks), device_slots=2, staging_buffers=1)
        running = stack.enter_context(
            BlockStream(
                component.blocks, residency, passes=1, device=CPU, device_ledger=device,
                host_ledger=host,
            )
        )  # fmt: skip

        def visits() -> Iterator[tuple[int, Any]]:
            for index, tensors in running.forward_pass():
                with component.bound(tensors, index) as block:
                    yield index, block

        digest = forward(component, model, visits())
        read = running.stats.read_bytes
    return {
        "seconds": time.perf_counter() - started,
        "sha256": digest,
        "read_bytes": read,
        "block_bytes": sum(layout.read_bytes for layout in component.blocks),
        "ledgers_bytes": device.peak + host.peak,
        "parameters": component.source.parameters,
    }


@torch.no_grad()
def one_by_one(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same with a plain loop: no ring, no threads; each block loaded for its turn."""
    component, scratch, scratch_bytes = opened(folder)
    device, host = ByteLedger("VRAM", 2 << 30), ByteLedger("RAM", 1 << 30)
    started = time.perf_counter()

    def visits() -> Iterator[tuple[int, Any]]:
        for index, layout in enumerate(component.blocks):
            with (
                load_block(
                    layout, device=CPU, device_ledger=device, host_ledger=host
                ) as tensors,
                component.bound(tensors, index) as block,
            ):  # fmt: skip
                yield index, block

    with _ends(component, device, host) as model, scratch.held(scratch_bytes):
        digest = forward(component, model, visits())
    return {"seconds": time.perf_counter() - started, "sha256": digest}


@contextmanager
def _ends(component: Component, device: ByteLedger, host: ByteLedger) -> Iterator[Any]:
    """The network with what lies outside its blocks."""
    loaded = load_block(component.rest, device=CPU, device_ledger=device, host_ledger=host)
    with loaded as tensors, component.bound(tensors) as model:
        yield model


ROLES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "write": write,
    "stream": stream,
    "one_by_one": one_by_one,
}


def summary(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the three processes say together."""
    streamed, alone = found["stream"], found["one_by_one"]
    return {
        "benchmark": "big_h3",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "model": f"minimax-h3, {options.blocks} blocks, {options.format}",
        "parameters": streamed["parameters"],
        "file_bytes": found["write"]["bytes"],
        "rows": LAYOUT.rows,
        "identical": streamed["sha256"] == alone["sha256"],
        "limit_bytes": LIMIT_BYTES,
        "under_limit": streamed["peak_bytes"] < LIMIT_BYTES,
        "peak_gib": round(streamed["peak_bytes"] / 2**30, 3),
        **found,
    }


if __name__ == "__main__":
    main()
