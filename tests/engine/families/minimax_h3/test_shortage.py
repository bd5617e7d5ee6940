"""MiniMax-H3 short of memory, and watched by previews: the same latents in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.run.events import Progress, Replanned
from penstock.errors import OutOfMemory
from tests.engine.families.minimax_h3 import tiny
from tests.engine.families.minimax_h3.test_job import _request
from tests.faults.memory import DeviceAllocations, Reservations

STEPS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny.write(tmp_path_factory.mktemp("short"))
    with Engine.open(model.folder, device="cpu", vram="1GiB", ram="1GiB") as opened:
        yield opened


@pytest.fixture(scope="module")
def latents(engine: Engine) -> Tensor:
    return engine.submit(_request(engine, steps=STEPS)).result().latents


def test_a_refused_reservation_ends_in_the_same_result_or_a_resumable_job(
    engine: Engine, latents: Tensor, tmp_path: Path
) -> None:
    request = _request(engine, steps=STEPS)
    with Reservations() as counted:
        engine.submit(request).result()
    went_on = 0
    for at in range(2, counted.calls, max(1, counted.calls // 6)):
        with Reservations(fail_at=at) as faulty:
            job = engine.submit(request, job_dir=tmp_path / f"{at}")
            replanned = [event for event in job.events() if isinstance(event, Replanned)]
            try:
                result = job.result()
                went_on += 1
                assert replanned
            except OutOfMemory as error:
                assert "resume" in str(error)
                result = None
        assert faulty.failed == 1
        if result is None:
            result = engine.resume(tmp_path / f"{at}").result()
        assert torch.equal(result.latents, latents)
    assert went_on >= 2


def test_a_shortage_in_a_step_costs_that_step_only(engine: Engine, latents: Tensor) -> None:
    request = _request(engine, steps=STEPS)
    with DeviceAllocations(inside="packed_forward") as counted:
        engine.submit(request).result()
    with DeviceAllocations(inside="packed_forward", fail_at=counted.calls * 3 // 4) as faulty:
        job = engine.submit(request)
        events = list(job.events())
        result = job.result()
    assert faulty.failed == 1
    done = [e.step for e in events if isinstance(e, Progress) and e.phase == "denoise"]
    assert done == [1, 2]
    assert any(isinstance(event, Replanned) for event in events)
    assert torch.equal(result.latents, latents)


def test_previews_are_pictures_of_the_latents_and_change_nothing(
    engine: Engine, latents: Tensor
) -> None:
    job = engine.submit(_request(engine, steps=STEPS), preview_every=1)
    shown = [e.preview for e in job.events() if isinstance(e, Progress) and e.phase == "denoise"]
    result = job.result()
    assert torch.equal(result.latents, latents)
    assert [(each.width, each.height, len(each.rgb)) for each in shown] == [(4, 2, 24)] * 2
    assert len({each.rgb[at : at + 3] for each in shown for at in range(0, 24, 3)}) > 4
    assert any("previews: colours" in note for note in result.report.notices)
    for phase in result.report.phases:
        assert phase.measured_vram_bytes <= phase.predicted_vram_bytes
