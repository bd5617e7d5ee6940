"""penstock: video models far larger than the card, inside a byte budget.

Importing this costs nothing; a name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penstock._version import __version__

if TYPE_CHECKING:
    from penstock.engine.attach.pipe import (
        Attached,
        AttachReport,
        attach,
        detach,
        load_pipeline,
    )
    from penstock.engine.attach.stream import Streamed, StreamReport, stream
    from penstock.engine.engine import Engine
    from penstock.engine.job import Job
    from penstock.engine.report import JobResult, RunReport
    from penstock.engine.request import GenerationRequest
    from penstock.errors import OverBudget, PenstockError
    from penstock.profiles.plan import Plan

_HOMES = {
    "AttachReport": "penstock.engine.attach.pipe",
    "Attached": "penstock.engine.attach.pipe",
    "Engine": "penstock.engine.engine",
    "GenerationRequest": "penstock.engine.request",
    "Job": "penstock.engine.job",
    "JobResult": "penstock.engine.report",
    "OverBudget": "penstock.errors",
    "PenstockError": "penstock.errors",
    "Plan": "penstock.profiles.plan",
    "RunReport": "penstock.engine.report",
    "StreamReport": "penstock.engine.attach.stream",
    "Streamed": "penstock.engine.attach.stream",
    "attach": "penstock.engine.attach.pipe",
    "detach": "penstock.engine.attach.pipe",
    "load_pipeline": "penstock.engine.attach.pipe",
    "stream": "penstock.engine.attach.stream",
}

__all__ = [
    "AttachReport",
    "Attached",
    "Engine",
    "GenerationRequest",
    "Job",
    "JobResult",
    "OverBudget",
    "PenstockError",
    "Plan",
    "RunReport",
    "StreamReport",
    "Streamed",
    "__version__",
    "attach",
    "detach",
    "load_pipeline",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
