"""What goes to a person's terminal: text as text, and never a reason for a job to end.

Names, prompts and errors may hold anything: markup of rich is shown as it stands, and characters
that move the cursor or change colours are escaped. Where nobody reads any more (a closed pipe, a
terminal that is gone) what is printed is dropped, and the work goes on.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import unicodedata
from typing import Any, TextIO

from rich.console import Console

from penstock.cli.layout import wrap

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN)
"""Nobody reads any more: the other end of the pipe or the terminal is closed."""

ENDLESS = 1 << 16
"""Cells of a line that goes to a file or another program."""

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
_KEPT = frozenset("\n\t")


def printable(text: str, *, lines: bool = False) -> str:
    """Escape control characters in ``text``, and what is no text at all.

    Args:
        text: of anybody.
        lines: it may have several lines; else a line's end is escaped too.
    """
    return "".join(_shown(each, lines) for each in text)


def _shown(character: str, lines: bool) -> str:
    odd = unicodedata.category(character) in ("Cc", "Cs") or character in _BIDI
    if not odd or (lines and character in _KEPT):
        return character
    return character.encode("unicode_escape").decode("ascii")


def say(text: str) -> None:
    """Print an answer on stdout, whatever names are in it."""
    print(printable(text, lines=True))


def warn(text: str) -> None:
    """Print one line on stderr, whatever names are in it; a terminal's is wrapped at words."""
    width = Screen(stderr=True).width if sys.stderr.isatty() else ENDLESS
    print("\n".join(wrap(printable(text), width)), file=sys.stderr)


class Screen(Console):
    """A console that shows text as it is: no markup, no emoji codes, no colours by guess.

    Args:
        stderr: else stdout.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Any:
        """Escape every text: all pass here, those in the cells of tables too."""
        return super().render_str(printable(text, lines=True), **how)

    @property
    def row_width(self) -> int:
        """Cells that a row of a list may take: as many as it needs where no terminal is."""
        seen = self.is_terminal or "COLUMNS" in os.environ
        return self.width if seen else ENDLESS


class _Steady(io.RawIOBase):
    """Writes to a descriptor; what nobody takes is dropped.

    Args:
        descriptor: of stdout or stderr.
        drops: the errors after which output is dropped; None: all of them. Another one is raised
            once, and what comes after it is dropped.
    """

    def __init__(self, descriptor: int, drops: tuple[int, ...] | None) -> None:
        self._descriptor, self._drops, self._failed = descriptor, drops, False

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether a person reads it."""
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write some of ``data``, or drop all of it."""
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            told = self._failed or self._drops is None or error.errno in self._drops
            self._failed = True
            if not told:
                raise
            return len(memoryview(data).cast("B"))


def keep_going() -> None:
    """Let this process outlive whoever started it and whoever reads what it prints.

    Standard streams that were closed become the null device, so that no file that is opened later
    gets their numbers; text that the terminal's encoding lacks is escaped. What cannot be shown on
    stderr is dropped for any reason, an answer on stdout only where nobody takes it.
    """
    _open_missing()
    if sys.platform == "win32" and sys.stdout.isatty():
        return  # a console there is written to by other means
    sys.stdout = _steady(sys.stdout, 1, GONE)
    sys.stderr = _steady(sys.stderr, 2, None)


def _open_missing() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: PTH123, SIM115 - a descriptor


def _steady(stream: TextIO | None, descriptor: int, drops: tuple[int, ...] | None) -> TextIO:
    encoding = "utf-8" if stream is None else stream.encoding
    raw = io.BufferedWriter(_Steady(descriptor, drops))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)


def asks_a_person() -> bool:
    """Return whether somebody sits at stdin and can answer."""
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except (OSError, ValueError):
        return False
