"""Fenced blocks of the documents, and what each says of how it is run.

A block of commands (``bash``) or of Python is run as it stands, in a folder where the names that
the documents use are small models (`tests.documents.stage`). What cannot be run here says so in a
comment before it:

    <!-- not run: WHY -->            nothing runs it; counted in `test_blocks`
    <!-- run by: tests/FILE.py -->   a test of its own does
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUN = ("bash", "python")
SHOWN = ("text", "json", "powershell", "toml", "yaml")
"""Languages of blocks that are looked at, not run; text and powershell must say why."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>not run|run by): (?P<why>[^\n]+) -->\n\n?)?"
    r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: whose.
        language: after the fence; "" where it says none.
        text: between the fences.
        note, why: "not run" or "run by" and the rest of that comment; "" where there is none.
    """

    page: Path
    language: str
    text: str
    note: str
    why: str

    def commands(self) -> list[list[str]]:
        """The words of each command, comments left out."""
        joined = self.text.replace("\\\n", " ")
        words = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [each for each in words if each]


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    return parsed(page.read_text(encoding="utf-8"), page)


def parsed(text: str, page: Path) -> list[Block]:
    """All of a text, in order."""
    return [
        Block(page, each["language"].strip(), each["text"], each["note"] or "", each["why"] or "")
        for each in _BLOCK.finditer(text)
    ]
