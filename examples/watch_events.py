"""Everything a job tells while it runs, with a preview at every second step."""

from pathlib import Path

from tiny import model_and_request

import penstock

with (
    model_and_request("a red circle moves to the right") as (model, request),
    penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine,
):
    job = engine.submit(request, preview_every=2)
    for event in job.events():
        if isinstance(event, penstock.PhaseStarted):
            print(f"{event.phase}: {event.total} {event.unit}s")
        elif isinstance(event, penstock.Progress) and event.unit == "step":
            print(
                f"  step {event.step}/{event.total}, {event.eta_s:.1f} s left, "
                f"VRAM {event.vram_bytes:,}, RAM {event.ram_bytes:,}, "
                f"waited {event.stall_s:.2f} s for weights"
            )
            if event.preview is not None:
                event.preview.to_image().save(Path(f"preview_{event.step}.png"))
        elif isinstance(event, penstock.Notice | penstock.Replanned):
            print(f"note: {event.message}")
    print(f"{job.result().report.seconds:.1f} s")
