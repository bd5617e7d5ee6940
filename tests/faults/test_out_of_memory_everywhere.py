"""Out of memory at every allocation of a short job, once and from then on (``make faults``)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.stage import Stage
from penstock.engine.store.journal import read_record
from penstock.errors import OutOfMemory, OverBudget
from penstock.offload.ledger import ByteLedger
from tests.engine.run.test_resume import a_request, an_engine
from tests.faults.memory import DeviceAllocations

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

EVERY = int(os.environ.get("FAULTS_EVERY", "1"))
FIRST = int(os.environ.get("FAULTS_FIRST", "1"))
"""Every allocation. With FAULTS_EVERY=n it is one of n, and n runs with FAULTS_FIRST=1 to n are all
of them, in pieces."""

REQUEST = a_request(None, width=32, height=32, frames=1, steps=3, guidance_scale=1.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny_model(
        tmp_path_factory.mktemp("t2v"),
        image_to_video=False,
        transformer={"num_layers": 2},
        text={"num_layers": 1},
        vae={"base_dim": 8},
    )
    with an_engine(folder) as engine:
        gc.collect()
        gc.freeze()  # every shrink collects garbage: not among all that the libraries have loaded
        yield engine
        gc.unfreeze()


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> list[ByteLedger]:
    made: list[ByteLedger] = []
    original = Stage.__init__

    def init(self: Stage, *arguments: Any) -> None:
        original(self, *arguments)
        made[:] = [self.device_ledger, self.host_ledger]

    monkeypatch.setattr(Stage, "__init__", init)
    return made


@pytest.mark.parametrize("stays", [False, True], ids=["once", "persistently"])
def test_out_of_memory_at_every_allocation(
    engine: Engine, tmp_path: Path, ledgers: list[ByteLedger], stays: bool
) -> None:
    whole = engine.submit(REQUEST).result()
    with DeviceAllocations(inside="run") as counted:
        engine.submit(REQUEST).result()
    assert counted.calls > 500
    identical = ended = 0
    places = range(FIRST, counted.calls + 1, EVERY)
    for at in places:
        folder = tmp_path / f"{at}"
        with DeviceAllocations(inside="run", fail_at=at, stays=stays) as faulty:
            job = engine.submit(REQUEST, job_dir=folder)
            job.wait()
        assert faulty.failed >= 1
        assert all(ledger.used == 0 for ledger in ledgers)
        try:
            result = job.result()
            identical += 1
        except OutOfMemory:
            assert read_record(folder).state == "failed"
            result = engine.resume(folder, allow_nonidentical=True).result()
            ended += 1
        assert torch.allclose(result.latents, whole.latents, atol=1e-5)
        if not stays:
            assert torch.equal(result.latents, whole.latents)
    gc.collect()
    how = "persistently" if stays else "once"
    print(
        f"\nout of memory {how} at {len(places)} of {counted.calls} allocations: "
        f"{identical} finished identical, {ended} ended resumable"
    )


def test_ram_and_vram_budgets_of_60_to_120_percent_of_the_plan(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", image_to_video=False, vae={"base_dim": 8})
    with an_engine(folder) as engine:
        plan = engine.plan(REQUEST)
        whole = engine.submit(REQUEST).result()
    told = []
    for percent in range(10, 125, 10):
        vram, ram = (n * percent // 100 for n in (plan.peak_vram_bytes, plan.peak_ram_bytes))
        told.append((percent, _outcome(folder, vram, ram, whole.latents)))
    print("\nbudgets in % of the plan: " + ", ".join(f"{p} {outcome}" for p, outcome in told))
    assert {outcome for _, outcome in told} == {"finished", "refused"}
    assert all(outcome == "finished" for percent, outcome in told if percent >= 100)


def _outcome(folder: Path, vram: int, ram: int, latents: torch.Tensor) -> str:
    with an_engine(folder, vram=vram, ram=ram) as engine:
        try:
            result = engine.submit(REQUEST).result()
        except OverBudget:
            return "refused"
        assert result.report.peak_vram_bytes <= vram
        assert torch.allclose(result.latents, latents, atol=1e-5)
        return "finished"
