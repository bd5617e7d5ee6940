"""What every view must hold: lines that fit the terminal, and words that are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.cells import cell_len

WIDTHS = (60, 80, 120)
HUGE = 1 << 14


def hold(view: Callable[[int], str], widths: Iterable[int] = WIDTHS) -> None:
    """At each width no line is longer, nothing is cut short, and no word is broken."""
    words = {word.removesuffix(":") for word in view(HUGE).split()}
    for width in widths:
        shown = view(width)
        assert "…" not in shown and "..." not in shown.replace("....", "")
        for line in shown.splitlines():
            assert cell_len(line) <= width, (width, line)
        found = {word.removesuffix(":") for word in shown.split()}
        assert found <= words, found - words
