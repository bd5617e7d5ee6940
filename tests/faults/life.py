"""The life of a job in its journal, without a model: what is saved and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import Journal, read_record
from penstock.errors import JournalError

STEPS = 3
GRID = (1, 2)
REQUEST = {"prompt": "a cat", "steps": STEPS, "seed": 7}
PLAN = {"chunk": 64}
FINGERPRINT = {"versions": {"torch": "2"}, "numerics": {"threads": 1}}
RESERVE_BYTES = 64 << 10


def noise() -> torch.Tensor:
    """The first state."""
    return torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 7


def conditioning() -> dict[str, torch.Tensor]:
    """What a prompt and a picture come to."""
    return {
        "prompt": torch.linspace(-1, 1, 10, dtype=torch.bfloat16).reshape(2, 5),
        "picture": torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn),
    }


def after(step: int) -> torch.Tensor:
    """The latents after ``step`` steps."""
    latents = noise()
    for index in range(step):
        latents = latents * 0.75 + index
    return latents


def tile(index: int) -> torch.Tensor:
    """The pixels of a tile: a function of the final latents."""
    return (after(STEPS)[0] * 10 + index).to(torch.uint8)


def start(folder: Path, ops: FileOps) -> Journal:
    """A new job."""
    return Journal.create(folder, REQUEST, PLAN, FINGERPRINT, reserve_bytes=RESERVE_BYTES, ops=ops)


def live(journal: Journal) -> Iterator[str]:
    """Do what is missing, one saved thing at a time; yields the name of each."""
    if journal.record.state == "done":
        journal.discard_work()
        return
    yield from _condition_and_sample(journal)
    for index in range(GRID[0] * GRID[1]):
        if journal.load_tile(GRID, index) is None:
            journal.save_tile(GRID, index, tile(index))
            yield f"tile {index}"
    journal.mark("done", output="out.mp4")
    yield "done"
    journal.discard_work()
    yield "discard"


def _condition_and_sample(journal: Journal) -> Iterator[str]:
    if journal.load_latents() is not None:
        return
    if journal.load_conditioning() is None:
        journal.save_conditioning(conditioning())
        yield "conditioning"
    state = journal.load_latest()
    if state is None:
        journal.save_step(0, {"latents": noise()}, {"order": 0})
        yield "step 0"
    step, latents = (0, noise()) if state is None else (state.step, state.tensors["latents"])
    while step < STEPS:
        latents = latents * 0.75 + step
        step += 1
        journal.save_step(step, {"latents": latents}, {"order": step})
        yield f"step {step}"
    journal.save_latents(latents)
    yield "latents"


def whole_life(folder: Path, ops: FileOps | None = None) -> None:
    """A job from its creation to its end."""
    with start(folder, ops or FileOps()) as journal:
        for _ in live(journal):
            pass


def finish(folder: Path) -> None:
    """Continue whatever is there, from nothing if there is nothing, and check the end."""
    try:
        journal = Journal.open(folder)
    except JournalError:
        journal = start(folder, FileOps())
    with journal:
        for _ in live(journal):
            pass
    with Journal.open(folder) as journal:
        assert journal.record.state == "done"
        latents = journal.load_latents()
        assert latents is not None
        assert torch.equal(latents, after(STEPS))
        assert journal.problems == ()


Seen = dict[str, Any]


def observe(folder: Path) -> Seen:
    """What a new process finds in the folder, part by part; damage shows as an error's text."""
    seen: Seen = {"record": None, "step": None, "conditioning": None, "latents": None}
    seen |= {f"tile {index}": None for index in range(GRID[0] * GRID[1])}
    with suppress(JournalError):
        seen["record"] = read_record(folder).state
    if seen["record"] is None:
        return seen
    with Journal.open(folder) as journal:
        if seen["record"] == "done":  # the work is being discarded: only the latents count
            assert journal.load_latents() is not None
            return seen
        seen["step"] = _observed_step(journal)
        if (tensors := journal.load_conditioning()) is not None:
            assert all(
                torch.equal(tensors[name].float(), value.float())
                for name, value in conditioning().items()
            )
            seen["conditioning"] = True
        if (latents := journal.load_latents()) is not None:
            assert torch.equal(latents, after(STEPS))
            seen["latents"] = True
        for index in journal.finished_tiles(GRID):
            if (frames := journal.load_tile(GRID, index)) is not None:
                assert torch.equal(frames, tile(index))
                seen[f"tile {index}"] = True
        if journal.problems:
            seen["problems"] = journal.problems
    return seen


def _observed_step(journal: Journal) -> int | str | None:
    try:
        state = journal.load_latest()
    except JournalError as error:
        return str(error)
    if state is None:
        return None
    assert torch.equal(state.tensors["latents"], after(state.step))
    assert state.values == {"order": state.step}
    return state.step
