"""What a video will take, before anything is loaded; and what happens where it does not fit."""

from tiny import model_and_request

import penstock

with model_and_request("a red circle moves to the right") as (model, request):
    with penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine:
        plan = engine.plan(request)
        print(f"peak VRAM {plan.peak_vram_bytes:,} bytes, RAM {plan.peak_ram_bytes:,} bytes")
        for phase in plan.phases:
            print(f"{phase.name:>8}: {phase.vram_bytes:>12,} VRAM  {phase.seconds:8.3f} s")
    with penstock.Engine.open(model, vram="1MiB", ram="12GiB") as engine:
        try:
            engine.plan(request)
        except penstock.OverBudget as error:
            print(f"needs {error.need_bytes:,} bytes of {error.resource}: {error}")
