"""Weights that change by one byte, between two jobs and between a stop and a resume."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.engine.engine import Engine
from penstock.engine.packs.firstuse import FirstUse
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.store.sums import SETTLED_NS, Sums
from penstock.errors import FingerprintMismatch
from tests.engine.running import stop_after_a_step

REQUEST = GenerationRequest(
    prompt="a red circle", negative_prompt="", width=48, height=32, frames=5, steps=3, seed=3,
    guidance_scale=1.0,
)  # fmt: skip


@dataclass
class Tally:
    """What was noticed of the changes that were made.

    Attributes:
        changes: single bytes that were changed.
        packs: after which the pack of the old bytes was not used.
        resumes: after which the stopped job was not continued.
        believed: before which what was known of the file was believed without reading it.
    """

    changes: int = 0
    packs: int = 0
    resumes: int = 0
    believed: int = 0


class Clock:
    """A clock that runs so far ahead that a file which has just changed counts as settled: so each
    change meets the case that could be missed, in which no byte is read unless something differs.
    """

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        import time

        return time.time_ns() + 2 * SETTLED_NS


def change_bytes(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, count: int, seed: int
) -> Tally:
    """Change single bytes of the transformer of ``model`` (text to video, in one file), each put
    back before the next; the time of the last write is left to the system, or set back.

    Args:
        model: may be changed.
        folder: for the cache and the job.
        monkeypatch: for the clock.
        count: of changes.
        seed: of their places.
    """
    monkeypatch.setattr("penstock.engine.store.sums.time", Clock())
    (weights,) = (model / "transformer").glob("*.safetensors")
    options = {"device": "cpu", "vram": "2GiB", "ram": "2GiB", "format": "int8"}
    tally, rng = Tally(), random.Random(seed)
    with Engine.open(model, cache=folder / "cache", **options) as engine:
        stop_after_a_step(engine, REQUEST, folder / "job")
        use = FirstUse.of(engine.model.transformer.source, "int8", folder / "cache")
        assert use.is_made
        size = weights.stat().st_size
        for _ in range(count):
            known = Sums().known(weights)
            tally.believed += known is not None and known.read_bytes == 0
            place, set_back = rng.randrange(size), rng.random() < 0.5
            old = _flip(weights, place, 1 << rng.randrange(8), set_back=set_back)
            tally.changes += 1
            tally.packs += not _fits(use)
            try:
                engine.resume(folder / "job").cancel()
            except FingerprintMismatch as error:
                assert str(weights) in str(error)
                tally.resumes += 1
            _write(weights, place, old, set_back=True)
            assert _fits(use), "the old bytes are the old file"
    return tally


def _fits(use: FirstUse) -> bool:
    """Whether the next job would use the pack."""
    if use.is_made:
        return True
    return use.origin == {n: each.value for n, each in use.source_sums(lambda: None).items()}


def _flip(path: Path, place: int, bits: int, *, set_back: bool) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        old = file.read(1)
    _write(path, place, bytes([old[0] ^ bits]), set_back=set_back)
    return old


def _write(path: Path, place: int, data: bytes, *, set_back: bool) -> None:
    """Write in place, once the file system's clock has gone on since the last change."""
    before = path.stat()
    probe = path.with_name("clock")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > before.st_ctime_ns:
            break
    probe.unlink()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)
    if set_back:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
