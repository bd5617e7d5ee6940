"""Results that are only ever added to."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from penstock.batch.results import RESULTS_FILE, Result, Results
from penstock.engine.store.durable import FileOps
from penstock.errors import JournalError, StorageError


def result(name: str, state: str = "completed") -> Result:
    return Result(name, 1, "d" * 64, state, f"{name}.mp4", report={"seed": 1})


def test_what_was_added_is_read_again_and_the_last_word_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for each in (result("a", "failed"), result("b"), result("a")):
        results.add(each)
    assert Results(tmp_path).last("a") == result("a")
    assert Results(tmp_path).last("c") is None
    assert len((tmp_path / RESULTS_FILE).read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_short_is_removed(tmp_path: Path, cut: int) -> None:
    results = Results(tmp_path)
    results.add(result("a"))
    results.add(result("b"))
    data = results.path.read_bytes()
    results.path.write_bytes(data[:-cut])
    again = Results(tmp_path)
    assert again.last("a") == result("a") and again.last("b") is None
    again.add(result("b"))
    assert results.path.read_bytes() == data


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    path.write_text(json.dumps({"mine": 1}) + "\n")
    with pytest.raises(JournalError, match="not a list of results in line 1"):
        Results(tmp_path)
    assert json.loads(path.read_text()) == {"mine": 1}


def test_neither_depth_nor_a_pipe_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    path.write_text('{"id": ' + "[" * 100_000 + "\n")
    with pytest.raises(JournalError, match="not a list of results in line 1"):
        Results(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="a named pipe"):
        Results(tmp_path)


def test_a_result_is_synced_before_anybody_is_told(tmp_path: Path) -> None:
    class Failing(FileOps):
        def fsync(self, descriptor: int) -> None:
            raise OSError(errno.EIO, "a test")

    results = Results(tmp_path, Failing())
    with pytest.raises(StorageError):
        results.add(result("a"))
    assert results.last("a") is None
