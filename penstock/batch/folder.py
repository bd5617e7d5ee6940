"""The folder of a list's videos: what is there already, and where each request is worked on.

results.jsonl          what has become of each request (`penstock.batch.results`)
NAME.mp4               a finished video
jobs/NAME-DIGEST/      a request that is being made: an order's folder (`penstock.serve.order`)
lock                   held while a process works on the folder
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from penstock.batch.lines import Line
from penstock.batch.results import Result, Results
from penstock.closing import Closing
from penstock.engine.run.jobs import describe
from penstock.engine.store.durable import FileOps, remove_if_empty, storing
from penstock.engine.store.lock import JobLock
from penstock.errors import OutputError, UsageError
from penstock.serve.order import JOURNAL, VIDEO

_REPORTED = ("seed", "width", "height", "frames", "fps", "seconds", "weight_format",
             "peak_vram_bytes", "peak_ram_bytes", "process_peak_bytes")  # fmt: skip


class OutputFolder(Closing):
    """Held by this process until it is closed.

    Args:
        path: made if absent.

    Raises:
        JobLocked: another process works on it.
        JournalError: its results are something else's.
        StorageError: it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._ops = path.absolute(), FileOps()
        with storing(self._ops, self.path):
            self._ops.mkdir(self.path)
        self._lock = JobLock(self.path / "lock")
        try:
            self.results = Results(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others work on it."""
        self._lock.remove()

    def place_of(self, line: Line) -> Path:
        """Return where a request is worked on."""
        return self.path / "jobs" / f"{line.name}-{line.digest[:12]}"

    def output_of(self, line: Line) -> Path:
        """Return where its video goes."""
        return self.path / f"{line.name}.mp4"

    def is_done(self, line: Line) -> bool:
        """Return whether its video is there, which is noted now if it was not.

        Raises:
            UsageError: something else was made under its name.
            OutputError: a file of that name is nobody's.
        """
        last, output = self.results.last(line.name), self.output_of(line)
        if last is not None and last.state == "completed":
            if last.digest != line.digest:
                raise UsageError(
                    f"{line.name} was made from another request, which line {last.line} was",
                    expected="a list that only grows",
                    remedy="Give this request a new id, or use another folder.",
                )
            self._tidy(line)
            return True
        if not output.exists():
            return False
        report = self._report(line)
        if report is None:
            raise OutputError(
                "the output exists already", expected="a free name", found=str(output)
            )
        self._note(line, "done", None, report)
        return True

    def _report(self, line: Line) -> dict[str, Any] | None:
        """Return the report of a finished job that nobody was told of."""
        journal = self.place_of(line) / JOURNAL
        if not journal.is_dir():
            return None
        record = describe(journal).record
        if record is None or record.state != "done":
            return None
        return dict(record.facts.get("report", {}))

    def step_of(self, line: Line) -> int | None:
        """Return the last step that is kept of a request; None where nothing of it is begun."""
        journal = self.place_of(line) / JOURNAL
        if not journal.is_dir():
            return None
        found = describe(journal)
        return None if found.record is None else found.step

    def completed(self, line: Line, began: str, worker: str, report: dict[str, Any]) -> Result:
        """Give a finished video its name, and note it.

        Raises:
            OutputError: somebody's file has the name by now; the video stays where it is.
            StorageError: the disk refuses.
        """
        video, output = self.place_of(line) / VIDEO, self.output_of(line)
        with storing(self._ops, output):
            try:
                self._ops.rename_new(video, output)
            except FileExistsError as error:
                raise OutputError(
                    "another file has taken this name meanwhile", found=str(output),
                    remedy=f"The video is {video}: it gets its name when that one is away.",
                ) from error  # fmt: skip
            self._ops.fsync_dir(self.path)
        return self._note(line, began, worker, report)

    def _note(self, line: Line, began: str, worker: str | None, report: dict[str, Any]) -> Result:
        told = {name: report[name] for name in _REPORTED if name in report}
        result = Result(
            line.name, line.number, line.digest, "completed",
            self.output_of(line).name, began, worker, told,
        )  # fmt: skip
        self.results.add(result)
        self._tidy(line)
        return result

    def _tidy(self, line: Line) -> None:
        """Remove what is left of a request that is done."""
        place = self.place_of(line)
        with storing(self._ops, place):
            if place.is_dir():
                shutil.rmtree(place)  # whatever an end in the middle of this has left
            if place.parent.is_dir():
                remove_if_empty(self._ops, place.parent)
