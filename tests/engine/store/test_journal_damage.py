"""Every file of a job damaged in every field: noticed, and the other generation taken instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import (
    CONDITIONING_FILE,
    JOB_FILES,
    LATENTS_FILE,
    STATE_FILES,
    Journal,
    read_record,
)
from penstock.engine.store.sealed import open_json, open_tensors, seal_json, seal_tensors
from penstock.errors import JournalError
from tests.faults.life import GRID, after, conditioning, live, start, tile

TILE_FILE = f"tile-{GRID[0]}x{GRID[1]}-0.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job with every kind of file: records of sequence 1 and 2, states of step 2 and 3."""
    folder = tmp_path / "job"
    with start(folder, FileOps()) as journal:
        for name in live(journal):
            if name == "tile 1":
                break
        journal.mark("stopped")
    return folder


def flips(blob: bytes, stride: int = 1) -> Iterator[bytes]:
    """``blob`` with one bit flipped, at each ``stride``-th byte, another bit each time."""
    for at in range(0, len(blob), stride):
        yield blob[:at] + bytes([blob[at] ^ (1 << (at % 8))]) + blob[at + 1 :]


def truncations(blob: bytes, count: int = 64) -> Iterator[bytes]:
    """``blob`` cut short at so many places, the empty file and one byte less among them."""
    for part in range(count):
        yield blob[: part * len(blob) // count]
    yield blob[:-1]
    yield blob + b"\0"


def damages(blob: bytes) -> Iterator[bytes]:
    yield from flips(blob)
    yield from truncations(blob)
    yield bytes(len(blob))


def test_damage_to_the_newer_state_falls_back_to_the_older(folder: Path) -> None:
    path = folder / STATE_FILES[1]  # step 3; step 2 is in the other
    whole, count = path.read_bytes(), 0
    with Journal.open(folder) as journal:
        latest = journal.load_latest()
        assert latest is not None and latest.step == 3
        for count, blob in enumerate(damages(whole), 1):
            path.write_bytes(blob)
            latest = journal.load_latest()
            assert latest is not None and latest.step == 2
            assert torch.equal(latest.tensors["latents"], after(2))
            assert len(journal.problems) == count and STATE_FILES[1] in journal.problems[-1]
    assert count >= 400


def test_damage_to_the_older_state_is_noticed_and_harmless(folder: Path) -> None:
    (folder / STATE_FILES[0]).write_bytes(b"junk")
    with Journal.open(folder) as journal:
        latest = journal.load_latest()
        assert latest is not None and latest.step == 3
        assert STATE_FILES[0] in journal.problems[0]
        journal.save_step(4, {"latents": after(4)}, {})
    with Journal.open(folder) as journal:
        latest = journal.load_latest()
        assert latest is not None and latest.step == 4 and not journal.problems


def test_two_damaged_states_are_a_named_error(folder: Path) -> None:
    for name in STATE_FILES:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])
    with Journal.open(folder) as journal, pytest.raises(JournalError) as caught:
        journal.load_latest()
    text = str(caught.value)
    assert all(name in text for name in STATE_FILES)
    assert caught.value.code == "job_state" and "jobs rm" in text


def test_damage_to_the_newer_record_falls_back_to_the_older(folder: Path) -> None:
    path = folder / JOB_FILES[1]
    whole, count = path.read_bytes(), 0
    assert read_record(folder).state == "stopped"
    for count, blob in enumerate(damages(whole), 1):
        path.write_bytes(blob)
        record = read_record(folder)
        assert record.state == "running" and record.request["prompt"] == "a cat", count
    assert count >= 400


def test_two_damaged_records_are_a_named_error(folder: Path) -> None:
    for name in JOB_FILES:
        (folder / name).write_bytes(b"{}")
    with pytest.raises(JournalError, match=r"neither job-0\.json nor job-1\.json .* is usable"):
        Journal.open(folder)


Load = Callable[[Journal], Any]
SINGLE: list[tuple[str, Load]] = [
    (CONDITIONING_FILE, Journal.load_conditioning),
    (LATENTS_FILE, Journal.load_latents),
    (TILE_FILE, lambda journal: journal.load_tile(GRID, 0)),
]


@pytest.mark.parametrize(("name", "load"), SINGLE, ids=[name for name, _ in SINGLE])
def test_damage_to_what_can_be_computed_again_discards_it(
    folder: Path, name: str, load: Load
) -> None:
    path = folder / name
    whole, count = path.read_bytes(), 0
    with Journal.open(folder) as journal:
        assert load(journal) is not None and not journal.problems
        for count, blob in enumerate(damages(whole), 1):
            path.write_bytes(blob)
            assert load(journal) is None
            assert len(journal.problems) == count and name in journal.problems[-1]
        path.write_bytes(whole)
        assert load(journal) is not None
    assert count >= 200


def reseal_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = open_json(path.read_bytes())
    change(value)
    path.write_bytes(seal_json(value))


FIELDS = ("format", "sequence", "job", "created", "state", "request", "plan", "fingerprint",
          "reserve_bytes", "facts")  # fmt: skip


@pytest.mark.parametrize("wrong", [None, "", -1, [], {"a": 1}, True, "gone"], ids=repr)
@pytest.mark.parametrize("field", FIELDS)
def test_a_forged_record_with_a_right_digest_is_refused(
    folder: Path, field: str, wrong: object
) -> None:
    def change(value: dict[str, Any]) -> None:
        if wrong == "gone":
            del value[field]
        else:
            value[field] = wrong

    legal = {"job": ("",), "request": ({"a": 1},), "plan": ({"a": 1},), "created": (-1,),
             "fingerprint": ({"a": 1},), "facts": ({"a": 1},)}  # fmt: skip
    if wrong in legal.get(field, ()):
        pytest.skip("a legal value")
    reseal_json(folder / JOB_FILES[1], change)
    assert read_record(folder).state == "running"  # of the other generation


def test_an_unknown_field_is_refused(folder: Path) -> None:
    reseal_json(folder / JOB_FILES[1], lambda value: value.update(extra=1))
    assert read_record(folder).state == "running"


METADATA: list[tuple[str, str | None]] = [
    ("job", "0" * 32), ("job", None), ("penstock", "2"), ("penstock", None), ("step", "-1"),
    ("step", "x"), ("step", None), ("sequence", "-1"), ("sequence", None), ("values", "[]"),
    ("values", "{"), ("values", None), ("values", "[" * 100_000),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), METADATA, ids=lambda item: repr(item)[:20])
def test_a_forged_state_with_a_right_digest_is_refused(
    folder: Path, key: str, value: str | None
) -> None:
    path = folder / STATE_FILES[1]
    tensors, metadata = open_tensors(path.read_bytes())
    metadata = {k: v for k, v in metadata.items() if k != key}
    if value is not None:
        metadata[key] = value
    path.write_bytes(b"".join(seal_tensors(tensors, metadata)))
    with Journal.open(folder) as journal:
        latest = journal.load_latest()
        assert latest is not None and latest.step == 2


def test_a_file_of_another_job_or_another_tile_is_refused(folder: Path, tmp_path: Path) -> None:
    with start(tmp_path / "other", FileOps()) as other:
        other.save_conditioning(conditioning())
        other.save_tile(GRID, 1, tile(1))
    (folder / CONDITIONING_FILE).write_bytes((tmp_path / "other" / CONDITIONING_FILE).read_bytes())
    name = TILE_FILE.replace("-0.", "-1.")
    (folder / name).write_bytes((folder / TILE_FILE).read_bytes())
    with Journal.open(folder) as journal:
        assert journal.load_conditioning() is None
        assert journal.load_tile(GRID, 1) is None
        assert "belongs to another job" in journal.problems[0]


def forged_tensors(header: dict[str, Any], data: bytes) -> bytes:
    """A sealed safetensors file with a header of one's own."""
    import hashlib

    text = json.dumps({"__metadata__": {"digest": "0" * 64}} | header, separators=(",", ":"))
    blob = len(text).to_bytes(8, "little") + text.encode() + data
    digest = hashlib.sha256(blob).hexdigest().encode()
    return blob.replace(b"0" * 64, digest, 1)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]},
        {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        {"dtype": "NONE", "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        None,
        7,
    ],
    ids=str,
)
def test_a_lying_tensor_header_with_a_right_digest_is_refused(entry: object) -> None:
    right = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    tensors, _ = open_tensors(forged_tensors({"x": right}, b"\0" * 4))
    assert tensors["x"].item() == 0
    with pytest.raises(JournalError):
        open_tensors(forged_tensors({"x": entry}, b"\0" * 4))


def test_links_pipes_and_folders_are_not_read(folder: Path, tmp_path: Path) -> None:
    import os

    path = folder / CONDITIONING_FILE
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (folder / LATENTS_FILE).unlink()
    os.mkfifo(folder / LATENTS_FILE)
    (folder / TILE_FILE).unlink()
    (folder / TILE_FILE).mkdir()
    with Journal.open(folder) as journal:
        assert journal.load_conditioning() is None
        assert journal.load_latents() is None
        assert journal.load_tile(GRID, 0) is None
        assert len(journal.problems) == 3
