"""The command for lists of requests. Parse, call, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskID

from penstock.cli.bars import bars
from penstock.cli.files import Debug, Loras, Model, reported
from penstock.cli.options import NOTHING, with_options
from penstock.cli.paths import path_argument, path_option
from penstock.cli.stopping import Stopping
from penstock.cli.terminal import Screen, say, warn
from penstock.closing import Closing
from penstock.profiles.options import Options

Devices = Annotated[
    str | None,
    typer.Option(
        help='One worker per device: "0,1" (GPUs) or "cpu,cpu"; budgets that are '
        "not given are divided."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Workers on a Ray cluster, one per accelerator: its address, local (start one)"
        ' or auto. Needs "penstock[ray]".',
    ),
]


@with_options()
def batch(
    requests: Annotated[Path, path_argument("List of requests: one JSON object per line.")],
    output: Annotated[Path, path_option("Folder for the videos.", "--output", "-o")],
    model: Model = None,
    lora: Loras = None,
    devices: Devices = None,
    ray: Ray = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip lines that cannot be done, and do the others.")
    ] = False,
    options: Options = NOTHING,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the counts as one JSON object.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Generate the videos of a list, each exactly once, however often it is restarted."""
    from penstock.batch.run import Batch, make
    from penstock.serve.workers import Crowd

    console = Screen(stderr=True)
    with reported(debug), Stopping() as stop, BatchDisplay(console) as display:
        asked = Batch(
            requests, output, model, tuple(lora or ()), options, Crowd.of(devices, ray), skip_bad
        )
        summary = make(asked, display.show, display.begin, stop.at)
    if as_json:
        say(json.dumps(asdict(summary)))
    else:
        told = f"{summary.made} made, {summary.done} were done before, {summary.failed} failed"
        console.print(f"{told}: {output / 'results.jsonl'}", soft_wrap=True)
    if summary.failed:
        raise typer.Exit(1)


class BatchDisplay(Closing):
    """Shows a list's progress on ``console``: bars on a terminal, and a line a request."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = bars(console) if console.is_terminal else None
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._count = self._total = 0
        self._said: set[str] = set()

    def close(self) -> None:
        """Leave the terminal as it stands."""
        if self._bars is not None:
            self._bars.stop()

    def begin(self, todo: Any, workers: Sequence[str]) -> None:
        """Say what is left to do."""
        from penstock.cli.plan_view import clock

        for each in todo.bad:
            warn(str(each))
        self._total = len(todo.lines)
        last = clock(todo.seconds / len(workers))
        told = f"{self._total} to make, about {last} on {', '.join(workers)}"
        self._console.print(f"{told}; {todo.done} done before", soft_wrap=True)
        if self._bars is not None and self._total:
            self._bars.start()
            self._all = self._bars.add_task("all", total=self._total, facts="")

    def show(self, news: Any) -> None:
        """Show what happens."""
        from penstock.batch.dispatch import Began, Told

        if isinstance(news, Began):
            self._began(news)
        elif isinstance(news, Told):
            self._told(news)
        else:
            self._ended(news)

    def _began(self, news: Any) -> None:
        if news.death is not None:
            goes = "begins again" if news.began == "anew" else f"goes on {news.began}"
            self._line(f"{news.name}: {news.death}; {goes} on {news.worker}")
        elif news.began != "anew":
            self._line(f"{news.name}: goes on {news.began}")
        if self._bars is not None:
            self._tasks[news.name] = self._bars.add_task(news.name, total=100, facts=news.worker)

    def _told(self, news: Any) -> None:
        event = news.event
        if event["event"] == "notice":
            if event["message"] in self._said:
                return  # each of a hundred requests would say it again
            self._said.add(event["message"])
            self._line(f"{news.name}: note: {event['message']}")
        elif self._bars is not None and news.name in self._tasks:
            facts = f"{event['phase']} {event['step']}/{event['total']} on {news.worker}"
            self._bars.update(self._tasks[news.name], completed=event["progress"], facts=facts)

    def _ended(self, result: Any) -> None:
        self._count += 1
        place = f"[{self._count}/{self._total}] {result.id}"
        if result.error is not None:
            self._line(f"{place}: failed: {result.error['message']}")
        else:
            seconds = (result.report or {}).get("seconds", 0.0)
            self._line(f"{place}: {result.output}, {seconds:.1f} s on {result.worker}")
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(result.id))
            assert self._all is not None
            self._bars.advance(self._all)

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
