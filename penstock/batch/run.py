"""A list of requests from its first line to its last: checked, given out, and noted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.batch.checking import Checker
from penstock.batch.dispatch import Dispatch, News
from penstock.batch.folder import OutputFolder
from penstock.batch.lines import BadLine, Line, read_lines, sorted_out
from penstock.batch.results import Result
from penstock.errors import JobCancelled, UsageError
from penstock.profiles.options import Options
from penstock.serve.crew import Worker
from penstock.serve.order import error_values
from penstock.serve.workers import Crowd


@dataclass(frozen=True)
class Batch:
    """What ``penstock batch`` is asked for.

    Attributes:
        requests: the list's path.
        output: the folder of the videos.
        model: of lines that name none.
        loras: likewise.
        options: of every request.
        crowd: who makes them.
        skip_bad: lines that cannot be done are noted as failed, and the rest is made.
    """

    requests: Path
    output: Path
    model: str | None = None
    loras: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    crowd: Crowd = field(default_factory=Crowd)
    skip_bad: bool = False


@dataclass(frozen=True)
class Todo:
    """What is left of a list, after it was checked.

    Attributes:
        lines: to be made.
        done: how many were made by an earlier process.
        bad: lines that cannot be done.
        seconds: that the lines take one after the other, as planned.
    """

    lines: Sequence[Line]
    done: int
    bad: Sequence[BadLine]
    seconds: float


@dataclass
class Summary:
    """What became of a list.

    Attributes:
        requests: in the list.
        done: made before.
        made: made now.
        failed: tried and failed, or lines that could not be done.
    """

    requests: int
    done: int
    made: int = 0
    failed: int = 0

    def hear(self, news: News) -> None:
        """Count a result."""
        if isinstance(news, Result):
            self.made += news.state == "completed"
            self.failed += news.state != "completed"


def check(
    lines: Sequence[Line], bad: Sequence[BadLine], folder: OutputFolder, options: Options
) -> Todo:
    """Look at every line before the first is made: nothing is loaded.

    Args:
        lines: of the list.
        bad: those that are no request.
        options: of the batch, memory shared out among its workers.
    """
    done: list[Line] = []
    with Checker(options) as checker:

        def look(line: Line) -> None:
            if folder.is_done(line):
                done.append(line)
            else:
                checker.check(line, folder)

        good, unfit = sorted_out(lines, look)
        seconds = sum(checker.seconds.values())
    made = {line.name for line in done}
    todo = [line for line in good if line.name not in made]
    return Todo(todo, len(done), sorted([*bad, *unfit], key=lambda each: each.number), seconds)


def note_bad(folder: OutputFolder, bad: Sequence[BadLine]) -> None:
    """Note lines that cannot be done as failed, once."""
    for each in bad:
        error = error_values(each.error)
        last = folder.results.last(each.name)
        if last is None or (last.state != "completed" and last.error != error):
            folder.results.add(Result(each.name, each.number, "", "failed", error=error))


def make(
    batch: Batch,
    tell: Callable[[News], None],
    checked: Callable[[Todo, Sequence[str]], None],
    stopping: Callable[[Callable[[], None]], None],
) -> Summary:
    """Make a list's videos.

    Args:
        batch: what is asked for.
        tell: of all that happens.
        checked: called once with what is left to do and the workers' names, before anything runs.
        stopping: called with what stops it, from any thread or a signal's handler.

    Raises:
        UsageError: the list cannot be used; or lines cannot be done, and are not to be skipped:
            `checked` has been told.
        OSError: the list cannot be read.
        JobCancelled: it was stopped.
        JobLocked, JournalError, StorageError: of the folder.
    """
    lines, bad = read_lines(batch.requests, batch.model, batch.loras)  # before a folder is made
    with OutputFolder(batch.output) as folder:
        options = batch.crowd.shared_out(batch.options)
        todo = check(lines, bad, folder, options)
        places = {line.model: line.model for line in todo.lines}
        with batch.crowd.workers(places, options) as workers:
            checked(todo, [worker.name for worker in workers])
            if todo.bad and not batch.skip_bad:
                raise UsageError(
                    f"{len(todo.bad)} of the list's lines cannot be done",
                    remedy="Correct them, or pass --skip-bad to do the others; nothing was started",
                )
            note_bad(folder, todo.bad)
            count = len(todo.lines) + todo.done + len(todo.bad)
            summary = Summary(count, todo.done, failed=len(todo.bad))

            def hear(news: News) -> None:
                summary.hear(news)
                tell(news)

            asyncio.run(_dispatched(Dispatch(folder, todo.lines, hear), workers, stopping))
    return summary


async def _dispatched(
    dispatch: Dispatch,
    workers: Sequence[Worker],
    stopping: Callable[[Callable[[], None]], None],
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not loop.is_closed():  # else all is made, and what is left is to say so
            loop.call_soon_threadsafe(lambda: loop.create_task(dispatch.stop()))

    stopping(stop)
    if not await dispatch.run(workers):
        raise JobCancelled(
            "the list was stopped", remedy="Start the same command again: it resumes from here."
        )
