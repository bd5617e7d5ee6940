"""A job is stopped in the middle and continued: the result is the same to the bit."""

import tempfile
from dataclasses import replace
from pathlib import Path

from tiny import model_and_request

import penstock

with (
    model_and_request("a red circle moves to the right") as (model, request),
    penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine,
    tempfile.TemporaryDirectory() as folder,
):
    request = replace(request, seed=7)
    job = engine.submit(request, job_dir=Path(folder) / "job")
    for event in job.events():
        if isinstance(event, penstock.Progress) and event.unit == "step" and event.step == 2:
            job.cancel()
    try:
        job.result()
    except penstock.JobCancelled as error:
        print(f"stopped: {error}")

    resumed = engine.resume(Path(folder) / "job").result()
    whole = engine.submit(request).result()
    assert resumed.video.equal(whole.video)
    print("resumed: the same to the bit")
