"""Checksums of whole files: when what is known is believed, and that no changed byte is missed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.store import sums as module
from penstock.engine.store.digest import SAMPLE_BYTES, SAMPLES
from penstock.engine.store.sums import SETTLED_NS, FileSum, Sums, how_told
from penstock.errors import CheckpointChanged, StorageError
from tests.engine.conftest import SMALL_VAE
from tests.faults.changes import Clock, change_bytes

SIZE = SAMPLES * SAMPLE_BYTES + 1_000_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def known(tmp_path: Path) -> Sums:
    return Sums(tmp_path / "sums")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written counts as written long ago."""
    monkeypatch.setattr(module, "time", Clock())


def test_a_file_is_read_whole_once_and_then_believed(large: Path, known: Sums, later: None) -> None:
    assert known.known(large) is None
    value = xxhash.xxh3_128(large.read_bytes()).hexdigest()
    assert known.of(large) == FileSum(value, SIZE)
    assert known.of(large) == FileSum(value, 0)
    assert Sums(known._folder).known(large) == FileSum(value, 0)


def test_what_was_taken_right_after_a_change_is_not_believed(large: Path, known: Sums) -> None:
    """Two writes within a tick of the clock leave the same times."""
    assert known.of(large).read_bytes == SIZE
    assert known.of(large).read_bytes == SIZE


@pytest.mark.parametrize("what", ["mtime", "ctime", "inode", "device", "size", "samples"])
def test_each_sign_of_a_change_alone_makes_it_read_again(
    large: Path, known: Sums, later: None, what: str
) -> None:
    known.of(large)
    (note,) = (json.loads(path.read_text()) for path in known._folder.iterdir())
    names = {"mtime": "mtime_ns", "ctime": "ctime_ns"}
    if what == "samples":
        note["content"]["samples_sha256"] = "0" * 64
    else:
        note["identity"][names.get(what, what)] += 1
    (path,) = known._folder.iterdir()
    path.write_text(json.dumps(note))
    assert known.known(large) is None
    assert known.of(large).read_bytes == SIZE


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{}", b'{"identity": 3}', b"[" * 9999])
def test_a_damaged_note_is_no_note(large: Path, known: Sums, later: None, content: bytes) -> None:
    known.of(large)
    (path,) = known._folder.iterdir()
    path.write_bytes(content)
    assert known.of(large).read_bytes == SIZE
    assert known.of(large).read_bytes == 0


def test_where_nothing_can_be_kept_the_file_is_read_each_time(
    large: Path, tmp_path: Path, later: None
) -> None:
    (tmp_path / "file").write_text("no folder")
    known = Sums(tmp_path / "file" / "sums")
    assert known.of(large).read_bytes == known.of(large).read_bytes == SIZE


def test_a_small_file_is_simply_read(tmp_path: Path, known: Sums) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"weights")
    first = known.of(path)
    assert first.read_bytes == 7
    assert not known._folder.exists()
    path.write_bytes(b"Weights")
    assert known.of(path).value != first.value


def test_a_file_that_does_not_keep_still_is_refused(large: Path, known: Sums) -> None:
    def write() -> None:
        with large.open("r+b") as file:
            file.write(os.urandom(9))

    with pytest.raises(CheckpointChanged, match="while it is read"):
        known.of(large, write)


def test_reading_can_be_stopped_and_errors_are_named(large: Path, known: Sums) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        known.of(large, stop)
    with pytest.raises(StorageError, match="nowhere"):
        known.of(large.with_name("nowhere"))


def test_how_it_was_found_out_is_told() -> None:
    assert how_told([FileSum("a", 0), FileSum("b", 3 << 20), FileSum("c", 0)]) == (
        "2 by size, times, inode, device and samples and 1 by every byte (3.0 MiB read)"
    )
    assert how_told([]) == "none"
    assert SETTLED_NS == 2e9


def test_one_changed_byte_is_noticed_by_the_next_job_and_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(
        tmp_path / "model", image_to_video=False, vae=SMALL_VAE,
        transformer={"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 1},
    )  # fmt: skip
    found = change_bytes(model, tmp_path, monkeypatch, count=12, seed=1)
    assert (found.changes, found.packs, found.resumes, found.believed) == (12, 12, 12, 12)
