"""What a phase and weights take of a room's ledgers, and that all of it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.run.room import Room
from penstock.errors import LedgerOverflow
from tests.engine.running import a_request, an_engine


@pytest.fixture(scope="module")
def engine(t2v_folder: Path) -> Iterator[Engine]:
    with an_engine(t2v_folder) as opened:
        yield opened


def room_of(engine: Engine, vram_bytes: int, ram_bytes: int) -> Room:
    return Room(engine.model, torch.device("cpu"), vram_bytes, ram_bytes)


def test_a_phase_holds_what_it_takes_besides_weights(engine: Engine) -> None:
    for phase in engine.plan(a_request()).phases:
        room = room_of(engine, max(phase.work_bytes, 1), max(phase.ram_work_bytes, 1))
        with room.reserved(phase):
            assert room.device_ledger.used == phase.work_bytes
            assert room.host_ledger.used == phase.ram_work_bytes
        assert room.device_ledger.used == room.host_ledger.used == 0


@pytest.mark.parametrize(("vram", "ram", "memory"), [(-1, 0, "VRAM"), (0, -1, "RAM")])
def test_a_phase_that_does_not_fit_is_refused(
    engine: Engine, vram: int, ram: int, memory: str
) -> None:
    phase = engine.plan(a_request())["denoise"]
    room = room_of(engine, phase.work_bytes + vram, phase.ram_work_bytes + ram)
    with pytest.raises(LedgerOverflow) as refused, room.reserved(phase):
        pytest.fail("it began")
    assert refused.value.memory == memory
    assert room.device_ledger.used == room.host_ledger.used == 0


def test_weights_outside_the_blocks_are_held_while_they_are_used(engine: Engine) -> None:
    component = engine.model.streamed
    room = room_of(engine, 1 << 30, 1 << 30)
    made = component.made_bytes("cpu")
    with room.rest(component):
        assert room.device_ledger.used == component.rest.nbytes + made
    assert room.device_ledger.used == room.host_ledger.used == 0


def test_what_binding_makes_is_held_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    component = engine.model.streamed
    monkeypatch.setattr(type(component), "made_bytes", lambda self, device: 4096)
    room = room_of(engine, component.rest.nbytes + 4095, 1 << 30)
    with pytest.raises(LedgerOverflow, match="adapted weights"), room.rest(component):
        pytest.fail("it was bound")
    assert room.device_ledger.used == 0
