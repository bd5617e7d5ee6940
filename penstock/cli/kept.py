"""Where a job is kept, and whether an unfinished one like it is gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from penstock.cli.terminal import asks_a_person, printable, warn


def job_folder(
    values: Mapping[str, Any], folder: Path | None, resumes: bool | None
) -> tuple[Path, bool]:
    """Return where the job is kept, and whether an unfinished identical one there is continued.

    Args:
        values: what is asked for, as a job's record has it.
        folder: that the user names.
        resumes: without asking, or never; None: a person is asked.
    """
    from penstock.engine.run.jobs import find_unfinished, new_job_folder

    found = find_unfinished(values, folder)
    if found is not None and resumes is not False:
        question = f"job {found.name} is the same and unfinished ({found.step}/{found.steps} steps)"
        if resumes or _confirmed(f"{printable(question)}: continue it?"):
            return found.folder, True
        warn(f"note: {question}: penstock resume {found.folder.absolute()}")
    return folder or new_job_folder(), False


def _confirmed(question: str) -> bool:
    """Return whether a person says yes; nobody there, or gone meanwhile, means no."""
    try:
        return asks_a_person() and typer.confirm(question)
    except typer.Abort:
        return False
