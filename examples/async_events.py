"""Two jobs watched from one asyncio loop, which stays free while they run."""

import asyncio

from tiny import model_and_request

import penstock


async def watch(name: str, job: penstock.Job) -> None:
    """Print the steps of a job."""
    async for event in job.events():
        if isinstance(event, penstock.Progress) and event.unit == "step":
            print(f"{name}: step {event.step}/{event.total}")
    print(f"{name}: {job.result().report.seconds:.1f} s")


async def main() -> None:
    """Submit two jobs; the second waits for its turn."""
    with (
        model_and_request("a red circle moves to the right") as (model, request),
        penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine,
    ):
        await asyncio.gather(
            watch("first", engine.submit(request)), watch("second", engine.submit(request))
        )


asyncio.run(main())
