"""The page of commands, written from the commands themselves.

python -m documents.cli
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from penstock.cli.main import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_HEAD = """# Command line

Written by `python -m documents.cli` from the commands; `penstock COMMAND --help` says the same.
"""
_WORDS = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
_HEADINGS = "| {} | | |\n|---|---|---|\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    """All commands in the order of the help."""
    root = typer.main.get_command(app)
    return _HEAD + "".join(sections("penstock", root))


def sections(path: str, command: Any) -> Iterator[str]:
    """A command, then those beneath it."""
    told = " ".join(command.help.split("\f")[0].split()) if command.help else ""
    yield f"\n## {path}\n\n{told}\n" + "".join(tables(command))
    for name, each in getattr(command, "commands", {}).items():
        yield from sections(f"{path} {name}", each)


def tables(command: Any) -> Iterator[str]:
    """Arguments, then options."""
    for title, kind in (("argument", "argument"), ("option", "option")):
        rows = [row(each) for each in command.params if each.param_type_name == kind]
        if rows:
            yield "\n" + _HEADINGS.format(title) + "".join(rows)


def row(parameter: Any) -> str:
    """Its names and what it takes, its default, its help."""
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    elif not parameter.is_flag:
        names += f" `{taken(parameter)}`"
    cells = (names, default(parameter), " ".join((parameter.help or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def taken(parameter: Any) -> str:
    """What an option takes."""
    kind = parameter.type_descriptor.annotation
    if parameter.metavar:
        return str(parameter.metavar)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(each.value for each in kind)
    return _WORDS.get(kind, "TEXT")


def default(parameter: Any) -> str:
    """As the help shows it."""
    if parameter.required:
        return "required"
    value = parameter.default
    return f"`{value}`" if isinstance(value, (str, int, float)) and value not in (False, "") else ""


if __name__ == "__main__":
    main()
