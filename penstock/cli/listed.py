"""Tables of what is kept, jobs and packs: light, for they are printed at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.cli.layout import Column, table
from penstock.cli.plan_view import clock
from penstock.engine.packs.cache import CachedPack
from penstock.engine.run.jobs import JobInfo
from penstock.units import format_bytes

_JOBS = ("JOB", "STATE", "STEP", "AGE", "SIZE")
_PACKS = ("PACK", "SIZE", "MADE FROM")


def jobs_table(jobs: Sequence[JobInfo], width: int) -> str:
    """Lay out the jobs as a table: name, state, steps, age, size; newest first."""
    if not jobs:
        return "no jobs"
    now = time.time()
    rows = [
        (
            str(info.name),
            info.state,
            f"{info.step}/{info.steps}",
            clock(max(0.0, now - info.created)) if info.created else "?",
            format_bytes(info.size_bytes),
        )
        for info in jobs
    ]
    return "\n".join(table([Column(each) for each in _JOBS], rows, width))


def packs_table(packs: Sequence[CachedPack], width: int) -> str:
    """Lay out the packs in the cache: name, size, and what they were made from."""
    if not packs:
        return "no packs"
    rows = [
        (pack.name, format_bytes(pack.nbytes), pack.source if pack.complete else "(unfinished)")
        for pack in packs
    ]
    return "\n".join(table([Column(each) for each in _PACKS], rows, width))
