"""Text that fits a terminal: wrapped at words, in tables whose columns wrap, nothing cut short.

Widths are in terminal cells: a CJK character takes two. A word that is wider than the terminal, a
long path for one, stays whole: it is there to be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

NARROWEST = 20
"""Cells that are filled on narrower terminals all the same."""

_GAPS = (2, 1)
"""Cells between two columns, the first that fits."""


def wrap(text: str, width: int, indent: str = "", hanging: str | None = None) -> list[str]:
    """Return ``text`` in lines of at most ``width`` cells, broken between words only.

    Args:
        text: its own line ends are kept.
        indent: before the first line.
        hanging: before the others; None: as ``indent``.
    """
    width = max(width, NARROWEST)
    hanging = indent if hanging is None else hanging
    lines: list[str] = []
    for line in text.split("\n"):
        current = (hanging if lines else indent) + line[: len(line) - len(line.lstrip(" "))]
        empty = True
        for word in line.split():
            if not empty and cell_len(current) + 1 + cell_len(word) > width:
                lines.append(current)
                current, empty = hanging, True
            current += word if empty else f" {word}"
            empty = False
        lines.append(current.rstrip())
    return lines


def fitted(line: str, width: int) -> list[str]:
    """Return a line of a description in lines of ``width`` cells: a command continues as a shell
    takes it, and is left whole where it quotes something."""
    if cell_len(line) <= width:
        return [line]
    hanging = " " * (len(line) - len(line.lstrip(" ")) + 4)
    if _COMMAND not in line:
        return wrap(line, width, hanging=hanging)
    if "'" in line:
        return [line]
    *lines, last = wrap(line, width - 2, hanging=hanging)
    return [*(f"{each} \\" for each in lines), last]


def labelled(label: str, text: str, width: int, wide: int = 9) -> list[str]:
    """Return ``text`` behind ``label``, in a column of its own.

    Args:
        wide: cells of the label's column; a longer label is not cut.
    """
    return wrap(text, width, f"{label:<{wide - 1}} ", " " * wide)


def gauge(share: float, cells: int) -> str:
    """Return a bar of ``cells`` of which ``share``, 0 to 1, is full; plain ASCII."""
    full = int(min(max(share, 0.0), 1.0) * cells)
    return "[" + "#" * full + "." * (cells - full) + "]"


_COMMAND = "penstock generate "


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: at its top; may be empty.
        right: numbers: to the right, and never wrapped.
        whole: never wrapped: what is there to be copied.
    """

    heading: str = ""
    right: bool = False
    whole: bool = False

    @property
    def wraps(self) -> bool:
        """Whether its cells may take several lines."""
        return not (self.right or self.whole)


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the rows in aligned columns of ``width`` cells in all.

    What is too wide is wrapped between words, the widest column first. Where that is not enough
    either, each row becomes a paragraph: its first cell, and the others by their headings.
    """
    heads = [column.heading for column in columns]
    whole = [*([heads] if any(heads) else []), *rows]
    least = [_least(column, [row[n] for row in whole]) for n, column in enumerate(columns)]
    wanted = [max(cell_len(row[n]) for row in whole) for n in range(len(columns))]
    for gap in _GAPS:
        room = max(width, NARROWEST) - gap * (len(columns) - 1)
        if sum(least) <= room:
            widths = _shrunk(wanted, least, room)
            return [line for row in whole for line in _row(columns, row, widths, " " * gap)]
    return [line for row in rows for line in _paragraph(columns, row, width)]


def _least(column: Column, cells: Sequence[str]) -> int:
    """Return the narrowest that no word is broken in."""
    pieces = [word for cell in cells for word in cell.split()] if column.wraps else cells
    return max(map(cell_len, pieces), default=0)


def _shrunk(wanted: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    widths = list(wanted)
    while sum(widths) > room:
        widest = max(
            (n for n in range(len(widths)) if widths[n] > least[n]), key=lambda n: widths[n]
        )
        widths[widest] -= 1
    return widths


def _row(
    columns: Sequence[Column], row: Sequence[str], widths: Sequence[int], gap: str
) -> Iterator[str]:
    cells = [
        _lines(cell, wide) if column.wraps else [cell]
        for column, cell, wide in zip(columns, row, widths, strict=True)
    ]
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        yield gap.join(map(_padded, columns, parts, widths)).rstrip()


def _lines(cell: str, wide: int) -> list[str]:
    """As `wrap`, in a column that may be narrower than any terminal."""
    lines = [""]
    for word in cell.split():
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) > wide:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _padded(column: Column, text: str, wide: int) -> str:
    space = " " * (wide - cell_len(text))
    return space + text if column.right else text + space


def _paragraph(columns: Sequence[Column], row: Sequence[str], width: int) -> Iterator[str]:
    yield from wrap(row[0], width)
    for column, cell in zip(columns[1:], row[1:], strict=True):
        if cell:
            label = f"{column.heading}: " if column.heading else ""
            yield from wrap(label + cell, width, "  ", "    ")
