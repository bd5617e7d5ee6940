"""What a person sees while a job runs: a rich display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from penstock.cli.live import LiveView, peaks
from penstock.cli.memory import memory_told
from penstock.cli.plan_view import clock
from penstock.closing import Closing
from penstock.engine.run.events import Event, Notice, PhaseEnded, PhaseStarted, Replanned
from penstock.engine.run.events import Progress as Advance
from penstock.engine.run.report import PhaseReport, RunReport
from penstock.profiles.attending import Attending
from penstock.profiles.plan import COMPUTE_PATHS, RESIDUAL, PhasePlan, Plan
from penstock.units import format_bytes


class Display(Closing):
    """Shows the events of one job on ``console`` (stderr).

    Args:
        console: where to write; its ``is_terminal`` picks the live view or lines.
        plan: for the budgets that the bytes are shown against.
        quiet: nothing but notes is shown.
    """

    def __init__(self, console: Console, plan: Plan, *, quiet: bool = False) -> None:
        self._console = console
        self._plan = plan
        self._quiet = quiet
        self._live = LiveView(console, plan) if console.is_terminal and not quiet else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.__enter__()
        return self

    def close(self) -> None:
        """Leave the terminal as it stands."""
        if self._live is not None:
            self._live.close()

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Notice | Replanned):
            self._console.print(f"note: {event.message}", style="yellow")
        elif self._live is not None:
            self._live.show(event)
        elif not self._quiet:
            self._show_line(event)

    def _show_line(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            line = f"{event.phase}: {event.total} {event.unit}{'s' if event.total != 1 else ''}"
        elif isinstance(event, Advance):
            if event.unit != "step":
                return
            line = f"{event.phase}: {event.step}/{event.total}  {self._facts(event)}"
        elif isinstance(event, PhaseEnded):
            line = f"{event.report.name}: {_summary(event.report)}"
        else:
            return
        self._console.print(line, soft_wrap=True)

    def _facts(self, event: Advance) -> str:
        plan = self._plan
        return (
            f"{event.seconds_per_unit:.2f} s/{event.unit}, {clock(event.eta_s)} left, "
            f"VRAM {format_bytes(event.vram_bytes)} of {format_bytes(plan.vram_limit_bytes)}, "
            f"RAM {format_bytes(event.ram_bytes)} of {format_bytes(plan.ram_limit_bytes)}"
        )


def _summary(report: PhaseReport) -> str:
    return f"{report.seconds:.1f} s, {peaks(report)}"


def plan_summary(plan: Plan) -> str:
    """Say the plan in a few lines, as printed before anything is loaded."""
    lines = [
        f"plan: peak VRAM {format_bytes(plan.peak_vram_bytes)} "
        f"of {format_bytes(plan.vram_limit_bytes)}, "
        f"RAM {format_bytes(plan.peak_ram_bytes)} of {format_bytes(plan.ram_limit_bytes)} "
        f"in buffers; {memory_told(plan)}"
    ]
    lines += [f"plan: {phase.name}: {_cut(phase)}" for phase in plan.phases if phase.facts]
    lines.append(
        f"plan: blocks stored as {plan.weight_format}, compute {plan.compute}: "
        f"{COMPUTE_PATHS[plan.compute_path]}; "
        f"self-attention {Attending.of(plan.attention).backend.told}; "
        f"hidden states {RESIDUAL[plan.residual]}"
    )
    return "\n".join(lines)


def _cut(phase: PhasePlan) -> str:
    """Say where a phase's blocks live, and how it is cut."""
    stream = phase.stream
    told = () if stream is None else (
        f"{stream.n_blocks} blocks: {stream.device_resident} stay in VRAM, "
        f"{stream.host_resident} in RAM, {stream.disk_blocks} stream from disk",
    )  # fmt: skip
    return "; ".join((*told, *phase.facts))


def report_summary(report: RunReport) -> str:
    """Describe a finished job in one line."""
    return (
        f"wrote {report.output}: {report.frames} frames, {report.width}x{report.height}, "
        f"{_heard(report)}seed {report.seed}, "
        f"{report.weight_format} ({COMPUTE_PATHS[report.compute_path]}, "
        f"self-attention {Attending.of(report.attention).backend.told}, "
        f"hidden states {RESIDUAL[report.residual]}), {_computed(report)}"
        f"{report.seconds:.1f} s after {report.imports_s:.1f} s of imports, "
        f"peak VRAM {format_bytes(report.peak_vram_bytes)}, "
        f"RAM {format_bytes(report.peak_ram_bytes)} in buffers; the process took "
        f"{format_bytes(report.process_peak_bytes)} of RAM at most, "
        f"{format_bytes(report.beside_bytes)} of it besides them{_group(report.group_peak_bytes)}"
    )


def _heard(report: RunReport) -> str:
    return f"{report.sound_s:.2f} s of sound, " if report.sound_s else ""


def _computed(report: RunReport) -> str:
    """Return how many steps were computed, where some were skipped."""
    computed, steps = len(report.computed_steps), len(report.timesteps)
    return f"{computed} of {steps} steps computed, " if 0 < computed < steps else ""


def _group(nbytes: int | None) -> str:
    return "" if nbytes is None else f" (its control group {format_bytes(nbytes)}, caches counted)"


Show = Callable[[Event], None]


@contextmanager
def pack_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Provide a bar of bytes that appears with the first call of what is given: (what, done,
    total)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        tasks: list[TaskID] = []

        def show(what: str, done: int, total: int) -> None:
            if not tasks:
                tasks.append(bars.add_task(what, total=total))
            bars.update(tasks[0], description=what.replace("_", " "), completed=done)

        yield show
