"""A tool that looks at the latents after each step, steers them, and stops when it has enough."""

from tiny import model_and_request
from torch import Tensor

import penstock


def calm(step: int, latents: Tensor) -> Tensor | None:
    """Pull the frames towards their mean in the first two steps; fp32 (1, z, t, h, w)."""
    if step > 2:
        return None
    return latents.lerp(latents.mean(dim=2, keepdim=True), 0.2)


def enough(step: int, latents: Tensor) -> None:
    """Stop after the third step."""
    if step == 3:
        raise penstock.JobCancelled("the tool has seen enough")


with (
    model_and_request("a red circle moves to the right") as (model, request),
    penstock.Engine.open(model, vram="8GiB", ram="12GiB") as engine,
):
    report = engine.submit(request, on_step=calm).result().report
    print(f"steered: {report.steered}; {report.notices[-1]}")
    try:
        engine.submit(request, on_step=enough).result()
    except penstock.JobCancelled as error:
        print(f"stopped: {error}")
