"""A real run on the CPU beside its plan: what the ledgers measured is what was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.engine import Engine
from penstock.engine.request import GenerationRequest
from penstock.engine.synthetic import write_tiny_model
from penstock.units import MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), image_to_video=False)


@pytest.mark.parametrize(("vram", "ram"), [(24 * MIB, 40 * MIB), (200 * MIB, 200 * MIB)])
def test_peaks_are_those_of_the_plan(model: Path, vram: int, ram: int) -> None:
    with Engine.open(model, vram=vram, ram=ram, device="cpu") as engine:
        request = GenerationRequest(
            prompt="a cat", width=32, height=32, frames=5, steps=2, seed=1, grid=engine.model.grid
        )
        phases = engine.submit(request).result().report.phases
    assert [phase.name for phase in phases] == ["text", "context", "denoise", "decode"]
    for phase in phases:
        for measured, predicted in (
            (phase.measured_vram_bytes, phase.predicted_vram_bytes),
            (phase.measured_ram_bytes, phase.predicted_ram_bytes),
        ):
            assert 0.95 * predicted <= measured <= predicted, (phase.name, measured, predicted)
