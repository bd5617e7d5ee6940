"""What has become of a list's requests: a file of JSON lines that is only ever added to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.engine.store.durable import FileOps, storing
from penstock.errors import JournalError
from penstock.regular import read_regular

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What became of one request.

    Attributes:
        id: its name.
        line: its number in the list, from 1.
        digest: of what was asked for (`penstock.batch.lines.Line`).
        state: "completed" or "failed".
        output: file name of the video in the same folder, where there is one.
        began: "anew", or the step that it went on from, as "at step 5"; "done" where an earlier
            process had made the video and not said so.
        worker: that finished it.
        report: seed, size, frames, fps, seconds and peaks, in bytes.
        error: code, what, expected, found and remedy, of a failed one.
    """

    id: str
    line: int
    digest: str
    state: str
    output: str | None = None
    began: str = "anew"
    worker: str | None = None
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


class Results:
    """The results of a folder, those of earlier processes included. One process at a time.

    Args:
        folder: of the videos; the file is made by the first `add`.

    Raises:
        JournalError: the file holds something else.
        StorageError: it cannot be read.
    """

    def __init__(self, folder: Path, ops: FileOps | None = None) -> None:
        self.path = folder / RESULTS_FILE
        self._ops = ops or FileOps()
        with storing(self._ops, self.path):
            data = read_regular(self.path) if self.path.exists() else b""
            whole, _, torn = data.rpartition(b"\n")
            if torn:  # its writer was killed: nobody was told of that line
                self._ops.truncate(self.path, len(data) - len(torn))
        self._last = {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            found = self._read(number, line)
            self._last[found.id] = found

    def _read(self, number: int, line: bytes) -> Result:
        try:
            return Result(**json.loads(line))
        except (TypeError, ValueError, RecursionError) as error:
            raise JournalError(
                f"{self.path} is not a list of results in line {number}",
                expected="results of `penstock batch`",
                found=str(error),
                remedy="Take another folder, or move the file away.",
            ) from error

    def last(self, name: str) -> Result | None:
        """Return what was last said of a request."""
        return self._last.get(name)

    def add(self, result: Result) -> None:
        """Add one result; it is on the disk when this returns.

        Raises:
            StorageError: it could not be written; the file may end in a part of it, which the next
                start removes.
        """
        data = json.dumps(asdict(result)).encode() + b"\n"
        is_new = not self.path.exists()
        with storing(self._ops, self.path, len(data)):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags, 0o644)
            try:
                left = memoryview(data)
                while left:
                    left = left[self._ops.write(descriptor, left) :]
                self._ops.fsync(descriptor)
            finally:
                self._ops.close(descriptor)
            if is_new:
                self._ops.fsync_dir(self.path.parent)
        self._last[result.id] = result
