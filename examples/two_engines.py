"""Two engines in one process, each with its own budget, on two threads; and memory given back."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tiny import model_and_request

import penstock


def make(model: Path, request: penstock.GenerationRequest, vram: str) -> penstock.RunReport:
    """One engine, from its opening to its end."""
    with penstock.Engine.open(model, vram=vram, ram="6GiB") as engine:
        report = engine.submit(request).result().report
        engine.unload()  # VRAM and pinned memory are back; another submit would load again
        return report


with (
    model_and_request("a red circle moves to the right") as (model, request),
    ThreadPoolExecutor(2) as threads,
):
    first = threads.submit(make, model, request, "4GiB")
    second = threads.submit(make, model, replace(request, prompt="a blue square"), "2GiB")
    for report in (first.result(), second.result()):
        print(f"peak VRAM {report.peak_vram_bytes:,} of {report.vram_limit_bytes:,} bytes")
