"""A prompt becomes an mp4, under a budget."""

from pathlib import Path

from tiny import model_and_request

import penstock

with (
    model_and_request("a red circle moves to the right") as (model, request),
    penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine,
):
    result = engine.submit(request, Path("circle.mp4"), force=True).result()

report = result.report
print(f"{report.output}: {report.frames} frames, seed {report.seed}, {report.seconds:.1f} s")
print(f"peak VRAM {report.peak_vram_bytes:,} of {report.vram_limit_bytes:,} bytes")
