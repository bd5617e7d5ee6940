"""`generate` and `plan` of pipelines that penstock has no code for: diffusers' own, in a folder."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.cli.files import refusals_shown, reported
from penstock.cli.kept import job_folder
from penstock.cli.layout import Column, labelled, table, wrap
from penstock.cli.plan_view import clock, spoken
from penstock.cli.stopping import Stopping
from penstock.cli.terminal import Screen, printable, say
from penstock.errors import UsageError
from penstock.profiles.options import Options
from penstock.units import format_bytes, parse_bytes

Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE",
        help="Argument of a diffusers pipeline's call, such as num_frames=121; " "repeat for more.",
    ),
]  # fmt: skip
Activations = Annotated[
    str | None,
    typer.Option(
        help="Activation memory of a diffusers pipeline, such as 4GiB (found by a rehearsal)."
    ),
]

_OPTIONS = ("vram", "ram", "device", "format")
"""Run options that such a pipeline obeys."""


@dataclass(frozen=True)
class Given:
    """What the command line says of a call: ``--set``, and flags that mean an argument."""

    pairs: list[str]
    prompt: str | None
    image: Path | None
    negative: str | None
    size: str | None
    frames: int | None
    steps: int | None
    cfg: str | None
    seed: int | None
    fps: float | None
    options: Options
    activations: str | None

    def words(self) -> list[str]:
        """Return all of it as ``name=value``."""
        width, _, height = (self.size or "").lower().partition("x")
        flags = {
            "prompt": self.prompt, "negative_prompt": self.negative, "image": self.image,
            "width": width or None, "height": height or None, "num_frames": self.frames,
            "num_inference_steps": self.steps, "guidance_scale": self.cfg,
        }  # fmt: skip
        return [
            f"{name}={value}" for name, value in flags.items() if value is not None
        ] + self.pairs


def is_foreign(model: str | None) -> bool:
    """Return whether ``model`` is a folder of a pipeline that no family of penstock's runs."""
    from penstock.engine.attach.routing import is_foreign as found

    with reported(debug=False):
        return model is not None and found(Path(model))


def own_only(arguments: list[str] | None, activations: str | None, debug: bool) -> None:
    """Refuse what means something to diffusers' pipelines only."""
    with reported(debug):
        for flag, value in (("--set", arguments), ("--activations", activations)):
            if value:
                raise UsageError(
                    f"{flag} is only for pipelines that diffusers runs",
                    expected="the model's own flags: --prompt, --size, --frames, --steps, ...",
                    found=f"{flag} {value[0] if isinstance(value, list) else value}",
                )


def plan_foreign(
    folder: Path, given: Given, strange: Mapping[str, Any], as_json: bool, debug: bool
) -> None:
    """Say what the call takes; a prompt that is not said is one word."""
    with reported(debug):
        words = given.words()
        if not any(word.startswith("prompt=") for word in words):
            words = ["prompt=a", *words]
        with (
            refusals_shown("this machine", as_json or debug),
            _job(folder, given, strange, words) as job,
        ):
            plan = job.plan
    if as_json:
        say(json.dumps(plan.to_json()))
    else:
        screen = Screen()
        screen.print(plan_text(plan, screen.width), soft_wrap=True)


@dataclass(frozen=True)
class Manner:
    """How a command goes about it: replaces files, prints JSON or nothing, shows tracebacks."""

    force: bool
    as_json: bool
    quiet: bool
    debug: bool


def generate_foreign(
    folder: Path,
    given: Given,
    strange: Mapping[str, Any],
    output: Path,
    manner: Manner,
    kept_in: Path | None = None,
    resumes: bool | None = None,
) -> None:
    """Make the call, and write what it gives.

    Args:
        kept_in: the folder of the job; None: one in the data directory.
        resumes: go on with an unfinished identical job without asking, or never.
    """
    with reported(manner.debug), Stopping() as stop:
        rate = None if given.fps is None else Fraction(str(given.fps))
        said = given.seed if given.seed != -1 else None
        seed = secrets.randbits(31) if said is None else said
        with _job(folder, given, strange, given.words()) as job:
            stop.at(job.cancel)
            keeper = None
            if job.plan.kept is not None:
                place, goes_on = job_folder(job.call(said, rate).values(), kept_in, resumes)
                if goes_on:
                    _resume(job, place, output, manner)
                    return
                keeper = job.begin(place, output, seed, rate, overwrite=manner.force)
            _run(job, manner, (), output, seed, rate, overwrite=manner.force, keeper=keeper)


def resume_foreign(
    folder: Path,
    output: Path | None,
    options: Options,
    strange: Mapping[str, Any],
    allow_nonidentical: bool,
    stop: Stopping,
    manner: Manner,
) -> None:
    """Go on with a job, under its own budgets or under those that are given now."""
    from penstock.engine.attach.foreign_kept import Call, budgets_of
    from penstock.engine.store.journal import read_record

    record = read_record(folder)
    call, (device, vram, ram) = Call.of(record), budgets_of(record)
    own = Options(device=device, vram=vram, ram=ram, format=call.weight_format)
    given = Given([], None, None, None, None, None, None, None, None, None, options.over(own), None)
    with _job(Path(call.pipeline_folder), given, strange, list(call.words)) as job:
        stop.at(job.cancel)
        _resume(job, folder, output, manner, allow_nonidentical=allow_nonidentical)


def _resume(
    job: Any, folder: Path, output: Path | None, manner: Manner, *, allow_nonidentical: bool = False
) -> None:
    from penstock.engine.attach.foreign_kept import Call
    from penstock.engine.store.journal import Journal

    journal = Journal.open(folder)
    try:
        call = Call.of(journal.record)
        keeper, order, told = job.resume(
            journal, output, force=manner.force, allow_nonidentical=allow_nonidentical
        )
    except BaseException:
        journal.close()
        raise
    rate = None if call.fps is None else Fraction(call.fps)
    _run(
        job, manner, told, order.output, call.seed, rate,
        overwrite=order.overwrite, keeper=keeper, trusts=allow_nonidentical,
    )  # fmt: skip


def _run(
    job: Any,
    manner: Manner,
    told: Sequence[str],
    output: Path,
    seed: int | None,
    rate: Fraction | None,
    **how: Any,
) -> None:
    """Run a job with its plan, notes, bar and report on the terminal."""
    console = Screen(stderr=True)
    with _StepBar(console, manner.quiet) as steps:
        if not manner.quiet:
            console.print(plan_text(job.plan, console.width), soft_wrap=True)
        _print_notes(console, told)
        report = job.run(output, seed, rate, steps.told, **how)
    _print_notes(console, report.problems)
    if not manner.quiet:
        console.print("\n".join(wrap(report_text(report), console.row_width)), soft_wrap=True)
    if manner.as_json:
        say(json.dumps({"plan": job.plan.to_json(), "report": report.to_json()}))


def _print_notes(console: Screen, notes: Sequence[str]) -> None:
    for note in notes:
        lines = wrap(f"note: {printable(note)}", console.row_width, hanging="      ")
        console.print("\n".join(lines), soft_wrap=True)


def _job(folder: Path, given: Given, strange: Mapping[str, Any], words: list[str]) -> Any:
    from penstock.engine.attach.foreign_job import CallJob
    from penstock.engine.attach.stream import budgets
    from penstock.formats.formats import get_format

    _check_understood(given.options, strange)
    options = given.options
    hardware = budgets(options.device or "auto", options.vram, options.ram)
    fmt = None if options.format is None else get_format(options.format)
    work = None if given.activations is None else parse_bytes(given.activations)
    return CallJob(folder, words, hardware, fmt, work)


def _check_understood(options: Options, strange: Mapping[str, Any]) -> None:
    others = {
        f"--{name.replace('_', '-')}": value
        for name, value in vars(options).items()
        if name not in _OPTIONS
    }
    for flag, value in {**strange, **others}.items():
        if value is not None:
            raise UsageError(
                f"{flag} is not supported for a pipeline that diffusers runs",
                expected="--set NAME=VALUE, --vram, --ram, --device, --format, --activations",
                found=flag,
            )


class _StepBar:
    """Bars on a terminal, lines elsewhere; nothing where it is to be quiet."""

    def __init__(self, console: Screen, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._bars = Progress(
            TextColumn("steps"), BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> _StepBar:
        if self._console.is_terminal and not self._quiet:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def told(self, step: int, steps: int) -> None:
        """Show that a step is done."""
        if self._quiet:
            return
        if not self._console.is_terminal:
            self._console.print(f"steps: {step}/{steps}", soft_wrap=True)
            return
        if self._task is None:
            self._task = self._bars.add_task("steps", total=steps)
        self._bars.update(self._task, completed=step, total=steps)


def plan_text(plan: Any, width: int) -> str:
    """Lay out the plan in lines of ``width`` cells: the answer, then the networks."""
    takes = "" if plan.seconds is None else f"; about {spoken(plan.seconds)}"
    lines = wrap(f"plan for {plan.pipeline}: it fits{takes}", width)
    for label, need, limit in (
        ("VRAM", plan.vram_bytes, plan.vram_limit_bytes),
        ("RAM", plan.ram_bytes, plan.ram_limit_bytes),
    ):
        told = f"{format_bytes(need)} at the least, of {format_bytes(limit)}"
        lines += labelled(label, told, width)
    lines += ["", *table(_COLUMNS, [_network(each) for each in plan.networks], width), ""]
    for note in plan.notes:
        lines += wrap(f"note: {note}", width, hanging="      ")
    return "\n".join(lines).rstrip()


_COLUMNS = (
    Column("network"), Column("weights", right=True), Column("blocks", right=True),
    Column("outside", right=True), Column("computing", right=True), Column("calls", right=True),
    Column("time", right=True),
)  # fmt: skip


def _network(each: Any) -> tuple[str, ...]:
    """Return its weights, how many blocks stream, what lies outside them, and what computing
    takes."""
    return (
        each.name.replace("_", " "),
        format_bytes(each.weight_bytes),
        str(each.blocks) if each.blocks else "whole",
        format_bytes(each.outside_bytes),
        format_bytes(each.activation_bytes),
        str(each.calls),
        "" if each.seconds is None else clock(each.seconds),
    )


def report_text(report: Any) -> str:
    """Describe what was made in one line."""
    answered = ""
    if report.answered_calls:
        calls = report.answered_calls + report.computed_calls
        answered = f", {report.answered_calls} of {calls} calls answered from records"
    return (
        f"wrote {printable(', '.join(report.outputs))}: {report.frames} frames, "
        f"seed {report.seed}, {report.seconds:.1f} s, "
        f"peak VRAM {format_bytes(report.peak_vram_bytes)}, "
        f"RAM {format_bytes(report.peak_ram_bytes)} in buffers, "
        f"{format_bytes(report.read_bytes)} read{answered}"
    )
