"""Previews as pictures, on terminals that say by their environment that they show them.

Two protocols: kitty's (kitty, ghostty), where a picture has a number, is sent once and put again at
every redraw, and iTerm2's (iTerm2, WezTerm), where it is sent with every redraw. No terminal is
asked what it can do: its answer would come in between what a person types. Where there is any doubt
(multiplexers, other machines, terminals started from within others) there is no protocol, and a
preview is drawn in half blocks instead. Sixel is left out: hardly a terminal that has it says so by
its environment.

Sources: https://sw.kovidgoyal.net/kitty/graphics-protocol/ and
https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import ControlType, Segment

from penstock.engine.run.preview import Preview

KITTY, ITERM2 = "kitty", "iterm2"

_BETWEEN = ("TMUX", "STY", "ZELLIJ", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "MOSH_CONNECTION")
"""Set where something stands between this process and the terminal."""
_OTHERS = (
    "VTE_VERSION", "XTERM_VERSION", "KONSOLE_VERSION", "ALACRITTY_WINDOW_ID", "WT_SESSION",
    "TERMINATOR_UUID", "VSCODE_PID", "INSIDE_EMACS",
)  # fmt: skip
"""Set by terminals that show no pictures. Started from one that does they inherit its variables."""
_BY_TERM: Mapping[str, str] = {"xterm-kitty": KITTY, "xterm-ghostty": KITTY}
_BY_PROGRAM: Mapping[str, str] = {"ghostty": KITTY, "iTerm.app": ITERM2, "WezTerm": ITERM2}
_CHUNK = 4096
"""Characters of base64 in one of kitty's sequences at most."""
_CELL_ASPECT = 2
"""Height of a cell over its width, about."""
_NO_WIDTH = ((ControlType.CURSOR_FORWARD, 0),)
"""Marks a segment as one that takes no cells."""


def protocol(environ: Mapping[str, str], platform: str) -> str | None:
    """Return by which protocol a terminal shows pictures; None where that is not certain.

    Args:
        environ: the variables of this process.
        platform: as `sys.platform` has it. On Windows the console drops what it does not know.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if platform == "win32" or any(name in environ for name in _BETWEEN + _OTHERS):
        return None
    if term.startswith(("screen", "tmux", "dumb")):
        return None
    if program:
        return _BY_PROGRAM.get(program)
    return KITTY if "KITTY_WINDOW_ID" in environ else _BY_TERM.get(term)


@dataclass(frozen=True)
class _Placed:
    """Rows of cells with a picture over them.

    It is drawn from the last of its rows, back upwards: these rows are on the screen by then, so
    that nothing scrolls while it is drawn, and the cursor is where rich takes it to be.

    Attributes:
        sequence: draws the picture, its upper left corner at the cursor.
        rows: lines that it covers.
    """

    sequence: str
    rows: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for _ in range(self.rows - 1):
            yield Segment.line()
        up = f"\x1b[{self.rows - 1}A" if self.rows > 1 else ""
        yield Segment(f"\r{up}\x1b7{self.sequence}\x1b8" + up.replace("A", "B"), None, _NO_WIDTH)


@dataclass(frozen=True)
class _Unseen:
    """What takes no cells."""

    sequence: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.sequence, None, _NO_WIDTH)


class Painter:
    """Draws one picture after another in the same place.

    Args:
        by: `KITTY` or `ITERM2`.
    """

    def __init__(self, by: str) -> None:
        self._by, self._number = by, os.getpid()
        self._there: Preview | None = None

    def draw(self, preview: Preview, width: int, rows: int) -> _Placed:
        """Return what shows ``preview`` in the place of the one before.

        Args:
            preview: the picture.
            width, rows: cells that it may take.
        """
        columns, lines = cells(preview, width, rows)
        if self._by == ITERM2:
            return _Placed(iterm2(png(preview), columns, lines), lines)
        place = f"i={self._number},p=1,c={columns},r={lines},C=1"
        if preview is self._there:  # kitty has it: an erased line does not erase it
            return _Placed(_kitty(f"a=p,{place}"), lines)
        self._there = preview
        return _Placed("".join(sent(png(preview), f"a=T,f=100,{place}")), lines)

    def clear(self) -> _Unseen | None:
        """Return what takes the picture away; None where there is none that stays by itself."""
        if self._there is None:
            return None
        self._there = None
        return _Unseen(_kitty(f"a=d,d=I,i={self._number}"))


def cells(preview: Preview, width: int, rows: int) -> tuple[int, int]:
    """Return columns and lines of the largest picture of that aspect in so many cells."""
    aspect = preview.width * _CELL_ASPECT / preview.height
    columns = max(1, min(width, int(rows * aspect)))
    return columns, max(1, min(rows, round(columns / aspect)))


def png(preview: Preview) -> bytes:
    """Return the picture as a file."""
    file = io.BytesIO()
    preview.to_image().save(file, "PNG")
    return file.getvalue()


def iterm2(file: bytes, columns: int, lines: int) -> str:
    """Return the sequence that shows a picture file in so many cells."""
    said = f"size={len(file)};width={columns};height={lines};preserveAspectRatio=1;inline=1"
    return f"\x1b]1337;File={said}:{base64.b64encode(file).decode()}\x07"


def sent(file: bytes, keys: str) -> Iterator[str]:
    """Yield kitty's sequences for a picture file, in chunks.

    Args:
        file: a PNG.
        keys: of the first of them: what is to be done with it.
    """
    text = base64.b64encode(file).decode()
    for start in range(0, len(text), _CHUNK):
        more = int(start + _CHUNK < len(text))
        told = f"{keys},m={more}" if start == 0 else f"m={more}"
        yield _kitty(told, text[start : start + _CHUNK])


def _kitty(keys: str, payload: str = "") -> str:
    """Return one sequence; ``q=2``: the terminal answers nothing, neither success nor failure."""
    return f"\x1b_G{keys},q=2;{payload}\x1b\\"
