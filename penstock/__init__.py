"""penstock: video models far larger than the card, inside a byte budget.

Importing this costs nothing; a name is loaded when it is first used. Every error is in
`penstock.errors`; all of them are a `PenstockError`.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

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
    from penstock.engine.request.generation import GenerationRequest
    from penstock.engine.run.eventlog import Events
    from penstock.engine.run.events import (
        Event,
        Notice,
        PhaseEnded,
        PhaseStarted,
        Progress,
        Replanned,
    )
    from penstock.engine.run.job import Job
    from penstock.engine.run.preview import Preview
    from penstock.engine.run.report import JobResult, PhaseReport, RunReport
    from penstock.errors import JobCancelled, OverBudget, PenstockError
    from penstock.profiles.plan import Plan

_HOMES = {
    "AttachReport": "penstock.engine.attach.pipe",
    "Attached": "penstock.engine.attach.pipe",
    "Engine": "penstock.engine.engine",
    "Event": "penstock.engine.run.events",
    "Events": "penstock.engine.run.eventlog",
    "GenerationRequest": "penstock.engine.request.generation",
    "Job": "penstock.engine.run.job",
    "JobCancelled": "penstock.errors",
    "JobResult": "penstock.engine.run.report",
    "Notice": "penstock.engine.run.events",
    "OverBudget": "penstock.errors",
    "PenstockError": "penstock.errors",
    "PhaseEnded": "penstock.engine.run.events",
    "PhaseReport": "penstock.engine.run.report",
    "PhaseStarted": "penstock.engine.run.events",
    "Plan": "penstock.profiles.plan",
    "Preview": "penstock.engine.run.preview",
    "Progress": "penstock.engine.run.events",
    "Replanned": "penstock.engine.run.events",
    "RunReport": "penstock.engine.run.report",
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
    "Event",
    "Events",
    "GenerationRequest",
    "Job",
    "JobCancelled",
    "JobResult",
    "Notice",
    "OverBudget",
    "PenstockError",
    "PhaseEnded",
    "PhaseReport",
    "PhaseStarted",
    "Plan",
    "Preview",
    "Progress",
    "Replanned",
    "RunReport",
    "StreamReport",
    "Streamed",
    "__version__",
    "attach",
    "detach",
    "load_pipeline",
    "stream",
]


if not TYPE_CHECKING:  # a type checker would take it to have every name

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
