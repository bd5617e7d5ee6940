"""A real run on the CPU beside its plan: what the ledgers measured is what was predicted.

What a saved job holds besides (states being saved, states read again) is counted by others: by the
storages that torch makes, and by Python's allocator.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.families.wan.plan import SAVED_TILE_COPIES
from penstock.engine.families.wan.terms import (
    latent_of,
    restored_bytes,
    saved_state_bytes,
    tile_bytes,
)
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.family.protocol import builtin
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run import keeper as keeper_module
from penstock.engine.run.keeper import JournalKeeper, Point
from penstock.engine.run.sampler import SamplerState
from penstock.engine.store.journal import Journal
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import RESTORED, Case, Workload
from penstock.profiles.policy import Policy
from penstock.profiles.rates import Rates
from penstock.profiles.tiling import TileGrid
from penstock.units import MIB
from tests.engine.run.lazy_disk import make_lazy
from tests.meter import StorageMeter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), image_to_video=False)


def a_request(engine: Engine, **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": "a cat", "width": 32, "height": 32, "frames": 5, "steps": 2, "seed": 1,
    }  # fmt: skip
    return GenerationRequest(**(values | changes), grid=engine.model.grid)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("vram", "ram"), [(24 * MIB, 40 * MIB), (200 * MIB, 200 * MIB)])
def test_peaks_are_those_of_the_plan(
    model: Path, tmp_path: Path, vram: int, ram: int, saved: bool
) -> None:
    with Engine.open(model, vram=vram, ram=ram, device="cpu") as engine:
        job = engine.submit(a_request(engine), job_dir=tmp_path / "job" if saved else None)
        phases = job.result().report.phases
    assert [phase.name for phase in phases] == ["text", "context", "denoise", "decode"]
    for phase in phases:
        for measured, predicted in (
            (phase.measured_vram_bytes, phase.predicted_vram_bytes),
            (phase.measured_ram_bytes, phase.predicted_ram_bytes),
        ):
            assert 0.95 * predicted <= measured <= predicted, (phase.name, measured, predicted)


def test_only_a_saved_job_counts_what_saving_takes(model: Path) -> None:
    with Engine.open(model, vram="200MiB", ram="200MiB", device="cpu") as engine:
        request = a_request(engine)
        saved, other = engine.plan(request, saved=True), engine.plan(request)
    latents = dict(saved["denoise"].ram_work)["latents"]
    assert saved["denoise"].ram_work_bytes == other["denoise"].ram_work_bytes + 4 * latents
    tile = SAVED_TILE_COPIES * 5 * 32 * 32 * 3
    assert saved["decode"].ram_work_bytes == other["decode"].ram_work_bytes + tile
    assert dict(saved["context"].ram_work)[RESTORED] >= 12 * latents
    assert {label for label, _ in other["context"].ram} & {RESTORED} == set()


def test_states_being_saved_take_what_the_plan_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy at a time, though a state is on the disk only when the next thing waits for it."""
    meter = StorageMeter()
    copy = keeper_module._copy

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        meter.exclude(tensor)
        with meter:
            return copy(tensor)

    make_lazy(monkeypatch)
    monkeypatch.setattr(keeper_module, "_copy", counted)
    with Engine.open(model, vram="200MiB", ram="200MiB", device="cpu") as engine:
        request = a_request(engine, width=160, height=96, frames=17, steps=4)
        planned = dict(engine.plan(request, saved=True)["denoise"].ram_work)["saved state"]
        engine.submit(request, job_dir=tmp_path / "job").result()
    assert 0.99 * planned <= meter.peak <= planned + 64  # and solvers' few scalars
    assert meter.live == 0


SHAPE = VideoShape(640, 384, 33)


def a_case() -> Case:
    manifest = builtin("wan2.1-i2v-14b", "int8")
    rates = Hardware("cpu", "", 1, 1, Rates(1e9, 1e9, 1e9)).rates
    return Case(manifest, Workload(SHAPE, 4, False, saved=True), rates, Policy(), "cpu")


@pytest.fixture
def keeper(tmp_path: Path) -> Any:
    keeper = JournalKeeper(Journal.create(tmp_path / "job", {}, {}, {}))
    yield keeper
    keeper.close()


def traced_peak_bytes(work: Any) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_a_state_takes_no_more_than_is_reserved(keeper: JournalKeeper) -> None:
    case = a_case()
    latents = torch.zeros(1, 16, *latent_of(case))
    history = {f"model_outputs.{index}": latents for index in range(3)}
    for step in (1, 2):
        keeper.save_point(Point(latents, SamplerState({"next_step": step}, history)))
    keeper.settle()
    assert saved_state_bytes(case) == 4 * latents.nbytes
    peak = traced_peak_bytes(keeper.point)
    assert 0.95 * restored_bytes(case) <= peak <= restored_bytes(case) + MIB


def test_a_saved_tile_takes_no_more_than_is_reserved(keeper: JournalKeeper) -> None:
    case, grid = a_case(), TileGrid(2, 3)
    film = torch.zeros(SHAPE.frames, SHAPE.height, SHAPE.width, 3, dtype=torch.uint8)
    tile = film[:, :192, :216]
    reserved = SAVED_TILE_COPIES * tile_bytes(case, grid)
    assert reserved == SAVED_TILE_COPIES * tile.nbytes
    with StorageMeter([film]) as meter:
        keeper._journal.save_tile((2, 3), 0, tile)
    assert meter.peak == tile.nbytes
    peak = traced_peak_bytes(lambda: list(keeper.tiles((2, 3))))
    assert 0.95 * reserved <= peak <= reserved + MIB
