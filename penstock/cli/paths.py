"""Paths on the command line: ``~`` is the home folder wherever a path is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def user_path(text: str | Path) -> Path:
    """Expand the home folder in ``text``: a shell leaves the ``~`` of
    ``--image=~/a.png``."""
    return Path(text).expanduser()


def path_option(help: str, *names: str, panel: str | None = None) -> Any:
    """Declare an option whose value is a path.

    Args:
        panel: where help lists it; None: among the others.
    """
    return typer.Option(*names, help=help, parser=user_path, metavar="PATH", rich_help_panel=panel)


def path_argument(help: str) -> Any:
    """Declare an argument that is a path."""
    return typer.Argument(help=help, parser=user_path, metavar="PATH")
