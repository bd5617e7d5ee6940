"""Where tables stand in a page, and which of them hold figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MARKER = re.compile(r"<!-- (/?)measured:\w+ -->")
_HELD = re.compile(r"<!-- held by: (\S+) -->")
_CODE = re.compile(r"`[^`]*`")
_TARGET = re.compile(r"\]\([^)]*\)")
_FIGURE = re.compile(r"(?<![\w.:/-])[-+]?\d[\d.,]*(?![\w-])")
"""A number that stands alone: no part of a name such as Wan2.1 or UMT5-XXL."""


@dataclass(frozen=True)
class PageTable:
    """A table of a page.

    Attributes:
        line: of its headings, from 1.
        rows: its lines without headings.
        rendered: whether it stands between markers.
        held_by: the test that holds it, as the comment before it says; "" where none does.
    """

    line: int
    rows: tuple[str, ...]
    rendered: bool
    held_by: str

    @property
    def figures(self) -> list[str]:
        """The numbers in its rows, outside code and addresses."""
        plain = (_TARGET.sub("]", _CODE.sub("", row)) for row in self.rows)
        return [figure for row in plain for figure in _FIGURE.findall(row)]


def tables(text: str) -> Iterator[PageTable]:
    """Every table of a page in Markdown, those in fenced blocks left out."""
    fenced, rendered, held = False, False, ""
    lines: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not fenced and line.startswith("|"):
            lines.append(line)
            continue
        if lines:
            yield PageTable(number - len(lines), tuple(lines[2:]), rendered, held)
            lines, held = [], ""
        if line.startswith("```"):
            fenced = not fenced
        if found := _MARKER.fullmatch(line):
            rendered = not found[1]
        if found := _HELD.fullmatch(line):
            held = found[1]
        elif line:
            held = ""
