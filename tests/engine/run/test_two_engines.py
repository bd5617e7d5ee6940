"""Two engines in two threads do not know of each other: results, budgets and files are as alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run import pipeline
from penstock.engine.run.report import JobResult, PhaseReport
from penstock.engine.run.stage import Stage
from tests.engine.running import a_request, an_engine

ROUNDS = 2


class Case:
    """A model, a request and budgets."""

    def __init__(self, folder: Path, request: GenerationRequest, budget: str) -> None:
        self.folder, self.request, self.budget = folder, request, budget

    def run(self, start: threading.Barrier | None = None) -> list[JobResult]:
        """Open, run some jobs, close; beginning together with others where there is a ``start``."""
        if start is not None:
            start.wait()
        with an_engine(self.folder, vram=self.budget, ram=self.budget) as engine:
            return [engine.submit(self.request).result() for _ in range(ROUNDS)]


@pytest.fixture
def cases(i2v_folder: Path, t2v_folder: Path, picture: Path) -> tuple[Case, Case]:
    return (
        Case(i2v_folder, a_request(image=picture, seed=5), "24MiB"),
        Case(t2v_folder, a_request(width=64, frames=9, sampler="euler"), "300MiB"),
    )


def test_a_job_computes_on_the_device_of_its_engine(
    cases: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread has a current device of its own, which is another one at first."""
    seen: list[tuple[str, torch.device]] = []

    def watched(device: torch.device) -> nullcontext[None]:
        seen.append((threading.current_thread().name, device))
        return nullcontext()

    monkeypatch.setattr(pipeline, "made_current", watched)
    cases[1].run()
    assert seen == [("penstock-job", torch.device("cpu"))] * ROUNDS
    prepared = Prepared.open(cases[1].folder, device="cpu")
    there = replace(prepared.chosen.hardware, device="cuda", index=1)
    prepared.chosen = replace(prepared.chosen, hardware=there)
    assert Engine(prepared)._device == torch.device("cuda", 1)


def _bytes(report: PhaseReport) -> dict[str, object]:
    """All that does not depend on the clock."""
    clock = ("seconds", "stall_s", "flow", "steps")
    return {name: value for name, value in vars(report).items() if name not in clock}


def test_together_as_alone(cases: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [case.run() for case in cases]
    stages: list[Stage] = []
    initialise = Stage.__init__

    def remember(self: Stage, *arguments: Any) -> None:
        initialise(self, *arguments)
        stages.append(self)

    monkeypatch.setattr(Stage, "__init__", remember)
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda case: case.run(start), cases))
    for before, now in zip(alone, together, strict=True):
        for one, other in zip(before, now, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.video, other.video)
            assert one.report.vram_limit_bytes == other.report.vram_limit_bytes
            assert list(map(_bytes, one.report.phases)) == list(map(_bytes, other.report.phases))
    limits = {results[0].report.vram_limit_bytes for results in together}
    assert len(limits) == 2
    ledgers = [ledger for stage in stages for ledger in (stage.device_ledger, stage.host_ledger)]
    assert len({id(ledger) for ledger in ledgers}) == len(ledgers) == 4 * ROUNDS
    assert {ledger.cap_bytes for ledger in ledgers} == limits
    assert all(ledger.used == 0 and 0 < ledger.peak <= ledger.cap_bytes for ledger in ledgers)
