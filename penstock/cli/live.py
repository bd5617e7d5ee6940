"""One live view of a running job on a terminal: its phases, how far each is, memory against the
budgets, which weights move, and a preview: a picture where the terminal says that it shows them
(`penstock.cli.pictures`), else coloured half blocks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from penstock.cli.layout import gauge, labelled
from penstock.cli.pictures import Painter, protocol
from penstock.cli.plan_view import clock
from penstock.closing import Closing
from penstock.engine.run.events import Event, PhaseEnded, PhaseStarted, Progress
from penstock.engine.run.preview import Preview
from penstock.engine.run.report import PhaseReport
from penstock.profiles.plan import PhasePlan, Plan
from penstock.units import format_bytes

_GAUGE_CELLS = 20
_LABEL_CELLS = 10
_PICTURE_CELLS = 72
"""Columns of a preview at most."""
_LEAST_PICTURE_ROWS = 6
"""Lines left on a terminal below which no preview is drawn."""
_COLOURED = ("truecolor", "256")


def shows_pictures(console: Console) -> bool:
    """Return whether a preview can be drawn: a terminal with 256 colours or more, and UTF-8."""
    coloured = console.color_system in _COLOURED and not console.no_color
    return console.is_terminal and coloured and console.encoding.startswith("utf")


@dataclass
class _Phase:
    """A phase as far as it is known."""

    name: str
    plan: PhasePlan | None = None
    began: bool = False
    told: Progress | None = None
    total: str = ""
    ended: PhaseEnded | None = None


def peaks(report: PhaseReport) -> str:
    """Return the most that a phase has held."""
    return (
        f"peak VRAM {format_bytes(report.measured_vram_bytes)}, "
        f"RAM {format_bytes(report.measured_ram_bytes)}"
    )


class LiveView(Closing):
    """Shows one job on a terminal until it is closed; what it has shown last stays.

    Args:
        console: of a terminal.
        plan: the phases to come, and the budgets.
    """

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console, self._plan = console, plan
        self._phases = [_Phase(each.name, each) for each in plan.phases]
        self._now: _Phase | None = None
        self._preview: Preview | None = None
        by = protocol(os.environ, sys.platform)
        self._painter = None if by is None else Painter(by)
        self._began = time.monotonic()
        self._lock = threading.Lock()  # rich draws on a thread of its own
        self._live = Live(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=4,
            vertical_overflow="crop",
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def close(self) -> None:
        """Leave the terminal as it stands, without the preview."""
        with self._lock:
            self._preview = None
        self._live.stop()

    def show(self, event: Event) -> None:
        """Take in one event; the next refresh draws it."""
        with self._lock:
            if isinstance(event, PhaseStarted):
                self._now = self._of(event.phase)
                self._now.began, self._now.told, self._now.ended = True, None, None
                self._now.total = f"{event.total} {event.unit}{'s' if event.total != 1 else ''}"
            elif isinstance(event, Progress):
                self._of(event.phase).told = event
                self._preview = event.preview or self._preview
            elif isinstance(event, PhaseEnded):
                self._of(event.phase).ended = event

    def _of(self, name: str) -> _Phase:
        """Return the phase of that name; one that no plan names comes where it begins."""
        for phase in self._phases:
            if phase.name == name:
                return phase
        place = next((n for n, each in enumerate(self._phases) if not each.began), 0)
        self._phases.insert(place, _Phase(name))
        return self._phases[place]

    def _drawn(self) -> Group:
        with self._lock:
            width, height = self._console.width, self._console.height
            lines = self.lines(width, height)
            rows = height - len(lines) - 1
            shown = self._preview if rows >= _LEAST_PICTURE_ROWS else None
            text = Text("\n".join(lines), no_wrap=True)
            if shown is not None:
                return Group(text, self._pictured(shown, width, rows))
            gone = None if self._painter is None else self._painter.clear()
            return Group(text) if gone is None else Group(gone, text)

    def _pictured(self, preview: Preview, width: int, rows: int) -> RenderableType:
        if self._painter is None:
            return picture(preview, width, rows)
        return self._painter.draw(preview, min(width - 1, _PICTURE_CELLS), rows)

    def lines(self, width: int, height: int) -> list[str]:
        """Lay out everything but the preview, in lines of ``width`` cells.

        Args:
            height: lines of the terminal: where phases do not fit, those that are done give way.
        """
        tail = [*self._whole(width), *self._memory(width), *self._moving(width)]
        phases = [line for phase in self._phases for line in self._line(phase, width)]
        spare = max(1, height - len(tail) - 1)
        first = min(max(0, len(phases) - spare), max(0, self._place() - 1))
        return [*phases[first : first + spare], *tail]

    def _place(self) -> int:
        return next((n for n, each in enumerate(self._phases) if each is self._now), 0)

    def _line(self, phase: _Phase, width: int) -> list[str]:
        if phase.ended is not None:
            told = self._done(phase.ended)
        elif phase.began:
            told = self._running(phase)
        elif self._now is not None and self._place() > self._phases.index(phase):
            told = "kept from before"
        else:
            told = "to come" if phase.plan is None else f"to come: {clock(phase.plan.seconds)}"
        return labelled(phase.name, told, width, _LABEL_CELLS)

    def _done(self, event: PhaseEnded) -> str:
        report = event.report
        return f"done in {clock(report.seconds)}, {peaks(report)}"

    def _running(self, phase: _Phase) -> str:
        told = phase.told
        if told is None:
            return f"{gauge(0.0, _GAUGE_CELLS)} {phase.total}"
        return (
            f"{gauge(told.step / told.total, _GAUGE_CELLS)} {told.step}/{told.total} "
            f"{told.unit}s, {told.seconds_per_unit:.2f} s each, {clock(told.eta_s)} left"
        )

    def _whole(self, width: int) -> list[str]:
        gone = time.monotonic() - self._began
        left = sum(each.plan.seconds for each in self._to_come if each.plan is not None)
        if self._now is not None and self._now.ended is None:
            left += self._left(self._now)
        told = f"{clock(gone)} gone, about {clock(left)} left"
        return ["", *labelled("job", told, width, _LABEL_CELLS)]

    def _left(self, phase: _Phase) -> float:
        if phase.told is not None:
            return phase.told.eta_s
        return 0.0 if phase.plan is None else phase.plan.seconds

    @property
    def _to_come(self) -> list[_Phase]:
        return [each for each in self._phases[self._place() :] if not each.began]

    def _memory(self, width: int) -> Iterator[str]:
        told = None if self._now is None else self._now.told
        if told is None:
            return
        for label, nbytes, limit in (
            ("VRAM", told.vram_bytes, self._plan.vram_limit_bytes),
            ("RAM", told.ram_bytes, self._plan.ram_limit_bytes),
        ):
            text = f"{format_bytes(nbytes)} of {format_bytes(limit)}"
            yield from labelled(
                label, f"{gauge(nbytes / limit, _GAUGE_CELLS)} {text}", width, _LABEL_CELLS
            )

    def _moving(self, width: int) -> list[str]:
        """Say where the blocks of the present phase come from, and what a pass over them moves."""
        plan = None if self._now is None else self._now.plan
        if plan is None or plan.stream is None:
            return []
        stream, passes = plan.stream, max(1, plan.forwards[1])
        each = "a step" if plan.forwards[1] else "in all"
        told = (
            f"{stream.device_resident} of {stream.n_blocks} blocks stay in VRAM, "
            f"{stream.host_resident} come from RAM, {stream.disk_blocks} from disk: "
            f"about {format_bytes(plan.copied_bytes // passes)} to the card and "
            f"{format_bytes(plan.read_bytes // passes)} read {each}"
        )
        return labelled("weights", told, width, _LABEL_CELLS)


def picture(preview: Preview, width: int, rows: int) -> Text:
    """Draw a preview in coloured half blocks, two pixels a cell, one above the other.

    Args:
        preview: the picture.
        width, rows: cells that it may take.
    """
    cells = min(width - 1, _PICTURE_CELLS, preview.width)
    scale = min(cells / preview.width, 2 * rows / preview.height)
    columns, lines = max(1, int(preview.width * scale)), max(1, int(preview.height * scale) // 2)
    drawn = Text(no_wrap=True)
    for line in range(lines):
        for column in range(columns):
            x = column * preview.width // columns
            upper, lower = (
                _colour(preview, x, half * preview.height // (2 * lines))
                for half in (2 * line, 2 * line + 1)
            )
            drawn.append("\N{UPPER HALF BLOCK}", Style(color=upper, bgcolor=lower))
        drawn.append("\n" if line + 1 < lines else "")
    return drawn


def _colour(preview: Preview, x: int, y: int) -> Color:
    start = 3 * (y * preview.width + x)
    return Color.from_rgb(*preview.rgb[start : start + 3])
