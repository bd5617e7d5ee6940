"""The bars of a running job on a terminal: light, for a command imports them at its first line."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def bars(console: Console) -> Progress:
    """Make bars: one a task, with its field ``facts`` behind it."""
    return Progress(
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
    )
