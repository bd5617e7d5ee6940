"""Real runs on the CPU beside their plans: bytes by the ledgers, resident memory, seconds.

A random model of some 200 MB makes a small video under many pairs of budgets. Each run is a forked
child of one process that has the libraries loaded:

- ``ledger``: of each phase, the measured peak over the predicted one, VRAM and RAM;
- ``rss``: the highest growth of the child's resident memory over the highest sum of VRAM and RAM
  that the plan states for a phase: on a CPU both are host memory. VmHWM begins anew with each
  phase; the growth is over what was resident before the run, after the same child had made the same
  video, so that the libraries' code is mapped (a fork maps none of it) and their kernels compiled;
- ``seconds``: predicted over measured, with rates that were measured on this machine just before:
  a calibration goes before each pair of budgets, and a plan has the medians of the last three.
  Measured is the median of three runs. Both clocks count the CPU seconds of the computing
  thread, not the time on the wall: waiting for the processor or for weights is not in them, but
  other programs' use of its caches and memory is. ``drift``: the seconds of one and the same small
  work after the runs over those before the calibration, which is the machine's own.

glibc's threshold for returning memory at once is fixed (``MALLOC_MMAP_THRESHOLD_``), as its own
grows with what was freed. Linux only. The last line on stdout is JSON.

    python -m benchmarks.saved [--frames 17] [--steps 1]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.machine.calibrate import Effort, calibrate
from penstock.engine.model.files import ModelFiles
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.run.events import Event, PhaseEnded, PhaseStarted
from penstock.engine.run.pipeline import run
from penstock.engine.run.stage import Run
from penstock.errors import OverBudget
from penstock.profiles.hardware import Hardware, probe
from penstock.profiles.plan import Plan
from penstock.profiles.planner import minimum_vram_bytes, plan
from penstock.profiles.rates import Rates
from penstock.units import format_bytes

TRANSFORMER = {
    "num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 12,
}  # fmt: skip
VRAM_SHARES = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0)
"""Of the least that a plan needs."""
RAM_SHARES = (0.3, 1.2)
"""Of the transformer's weights."""
RUNS = 3
"""Of each plan, whose median is its seconds."""
CALIBRATIONS = 3
"""The last ones, whose medians are a plan's rates."""
CONTROLS = 31
"""Of the small work, whose median is its seconds."""
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "65536")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak_rss() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(model: ModelFiles, request: GenerationRequest, made: Plan) -> dict[str, Any]:
    """The second run of ``made`` in this process; seconds are the medians of it and later ones."""
    began: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    rss: dict[str, int] = {}
    before = 0

    def listen(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            reset_peak_rss()
            began[event.phase] = time.thread_time()
        elif isinstance(event, PhaseEnded):
            name = event.report.name
            seconds.setdefault(name, []).append(time.thread_time() - began[name])
            rss.setdefault(name, status_bytes("VmHWM") - before)

    job = Run(
        model=model, request=request, plan=made, device=torch.device("cpu"), overlapped=True,
        output=None, overwrite=False, metadata=False,
    )  # fmt: skip
    run(job, lambda event: None, threading.Event())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    phases = run(job, listen, threading.Event()).report.phases
    for _ in range(RUNS - 1):
        run(job, listen, threading.Event())
    return {
        "rss": rss,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds_of_runs": seconds,
        "ledgers": {
            phase.name: [phase.measured_vram_bytes, phase.measured_ram_bytes] for phase in phases
        },
    }


def in_child(model: ModelFiles, request: GenerationRequest, made: Plan) -> dict[str, Any]:
    """`measured`, in a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(measured(model, request, made)).encode())
            code = 0
        finally:
            if code:
                import traceback

                traceback.print_exc()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit("a run failed: see above")
    return json.loads(told)  # type: ignore[no-any-return]


def row(made: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of one pair of budgets."""
    names = list(found["seconds"])
    ledger = [
        part / whole
        for name in names
        for part, whole in zip(
            found["ledgers"][name], (made[name].vram_bytes, made[name].ram_bytes), strict=True
        )
    ]
    both = {name: made[name].vram_bytes + made[name].ram_bytes for name in names}
    highest = max(found["rss"].values())
    stream = made["denoise"].stream
    assert stream is not None
    predicted_s = sum(made[name].seconds for name in names)
    return {
        "vram_bytes": made.vram_limit_bytes,
        "ram_bytes": made.ram_limit_bytes,
        "blocks": [stream.device_resident, stream.host_resident, stream.disk_blocks],
        "chunk_tokens": made["denoise"].chunk_tokens,
        "decode_tiles": made["decode"].tiles,
        "ledger": [round(min(ledger), 4), round(max(ledger), 4)],
        "rss": round(highest / max(both.values()), 4),
        "rss_bytes": highest,
        "rss_predicted_bytes": max(both.values()),
        "rss_of_phases": {name: [found["rss"][name], both[name]] for name in names},
        "seconds": round(predicted_s / sum(found["seconds"].values()), 3),
        "seconds_of_runs": found["seconds_of_runs"],
        "seconds_of_phases": {
            name: [round(made[name].seconds, 3), round(found["seconds"][name], 3)] for name in names
        },
    }


def rates_now(folder: Path) -> Rates:
    """One calibration, in CPU seconds."""
    effort = replace(Effort.on(torch.device("cpu")), clock=time.thread_time, seconds=0.2)
    return calibrate(torch.device("cpu"), folder, effort)


def medians(found: Sequence[Rates]) -> Rates:
    """The median of each rate over some calibrations."""
    names = [name for name, value in vars(found[0]).items() if isinstance(value, float)]
    return replace(
        found[0], **{name: statistics.median(getattr(each, name) for each in found)
                     for name in names}
    )  # fmt: skip


def control_s() -> float:
    """CPU seconds of one and the same small work."""
    left, right = torch.ones(768, 768), torch.ones(768, 768)
    frame, kernel = torch.ones(1, 32, 192, 256), torch.ones(32, 32, 3, 3)
    found = []
    for _ in range(CONTROLS):
        began = time.thread_time()
        torch.mm(left, right)
        torch.nn.functional.silu(torch.conv2d(frame, kernel, padding=1))
        found.append(time.thread_time() - began)
    return statistics.median(found)


def rows_of(
    model: ModelFiles, request: GenerationRequest, hardware: Hardware, folder: Path
) -> Iterator[dict[str, Any]]:
    """Every pair of budgets that has a plan."""
    workload, total = workload_of(request), model.manifest.transformer.weights.total_bytes
    least = minimum_vram_bytes(model.manifest, workload, hardware)
    recent: deque[Rates] = deque((rates_now(folder) for _ in range(CALIBRATIONS)), CALIBRATIONS)
    for ram in RAM_SHARES:
        for vram in VRAM_SHARES:
            before = control_s()
            recent.append(rates_now(folder))
            rates = medians(recent)
            machine = replace(
                hardware, rates=rates, vram_bytes=int(vram * least), ram_bytes=int(ram * total)
            )
            try:
                made = plan(model.manifest, workload, machine)
            except OverBudget as error:
                print(f"{vram} x {ram}: {error.resource} is too small", file=sys.stderr)
                continue
            found = row(made, in_child(model, request, made))
            drift = round(control_s() / before, 3)
            yield found | {"drift": drift, "rates": dict(vars(rates))}


def main() -> None:
    """Print a line a pair of budgets, then the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--frames", type=int, default=17)
    arguments.add_argument("--steps", type=int, default=1)
    options = arguments.parse_args()
    if os.environ.get(MALLOC[0]) != MALLOC[1]:
        os.environ[MALLOC[0]] = MALLOC[1]  # read by glibc when a process begins
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.saved", *sys.argv[1:]])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="penstock-kept-") as scratch:
        folder = write_tiny_model(
            Path(scratch), image_to_video=False, transformer=TRANSFORMER, vae={"base_dim": 16}
        )
        model = ModelFiles.open(folder)
        request = GenerationRequest(
            prompt="a cat", width=192, height=128, frames=options.frames, steps=options.steps,
            guidance_scale=1.0, seed=1, grid=model.grid,
        )  # fmt: skip
        rows = []
        for found in rows_of(model, request, probe("cpu"), Path(scratch)):
            rows.append(found)
            print(found, file=sys.stderr)
        model.close()
    print(json.dumps(report(rows)))


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The extremes and all rows."""
    ledger = [value for each in rows for value in each["ledger"]]
    return {
        "clock": "CPU seconds of the computing thread",
        "ledger_measured_over_predicted": [min(ledger), max(ledger)],
        "rss_measured_over_predicted": [min(r["rss"] for r in rows), max(r["rss"] for r in rows)],
        "seconds_predicted_over_measured": [
            min(r["seconds"] for r in rows), max(r["seconds"] for r in rows),
        ],
        "drift": [min(r["drift"] for r in rows), max(r["drift"] for r in rows)],
        "torch": torch.__version__,
        "largest": format_bytes(max(r["rss_bytes"] for r in rows)),
        "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    main()
