"""Does jobs in this process, one at a time: begun, or gone on with as their folder has them."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.engine.engine import Engine
from penstock.engine.request.settings import resolve
from penstock.engine.run.events import Event, Notice, PhaseEnded, PhaseStarted, Progress, Replanned
from penstock.engine.run.job import Job
from penstock.engine.run.jobs import describe, opening_of
from penstock.engine.run.preview import Preview
from penstock.errors import JobLocked, UsageError
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.serve.doer import Doer
from penstock.serve.order import Order, Tell, settings_of

log = logging.getLogger(__name__)

TELL_S = 0.1
"""Between two reports of one phase, where no preview comes with them."""

LOCKED_S, LOCKED_TRIES = 0.1, 300
"""How long the job of a worker that has just been killed may still be locked."""

_QUALITY = 80


class Runner(Doer[Order]):
    """Owns at most one engine.

    What an order's folder holds decides: nothing, and its job is begun; an unfinished job, and that
    goes on from its last step; a finished one, and nothing is done again.

    Args:
        models: places by name.
        options: budgets and the rest, for every job.
        cache: where packs are kept; None: as everywhere.
    """

    def __init__(
        self, models: Mapping[str, str], options: Options, cache: Path | None = None
    ) -> None:
        super().__init__()
        self._models, self._options, self._cache = dict(models), options, cache
        self._engine: Engine | None = None
        self._opened: object = None

    def done(self, order: Order, tell: Tell) -> dict[str, Any]:
        """Return ``{"report": ..., "size_bytes": ...}``."""
        report = self._finished(order) or self._made(order, tell)
        return {"report": report, "size_bytes": order.video.stat().st_size}

    def close(self) -> None:
        """Give everything back."""
        engine, self._engine, self._opened = self._engine, None, None
        if engine is not None:
            engine.close()

    def _finished(self, order: Order) -> dict[str, Any] | None:
        """Return the report of a job that was done before its end was noted."""
        if not order.journal.is_dir():
            return None
        found = describe(order.journal)
        done = found.state == "done" and found.record is not None and order.video.is_file()
        return found.record.facts.get("report", {}) if done and found.record is not None else None

    def _made(self, order: Order, tell: Tell) -> dict[str, Any]:
        job = self._begun(order)
        return self.watched(order, job, Teller(tell, job.plan).hear).report.to_json()

    def _begun(self, order: Order) -> Job:
        for _ in range(LOCKED_TRIES):
            try:
                return self._begun_once(order)
            except JobLocked:
                log.info("job %s is still locked by the worker before this one", order.id)
                time.sleep(LOCKED_S)
        return self._begun_once(order)

    def _begun_once(self, order: Order) -> Job:
        every = order.preview_every
        if order.journal.is_dir() and describe(order.journal).record is not None:
            engine = self._reopened(order)
            return engine.resume(order.journal, order.video, force=True, preview_every=every)
        engine = self._opened_for(order)
        request = resolve(settings_of(order.settings, Path(order.folder)), engine.model)
        order.journal.mkdir(parents=True, exist_ok=True)
        return engine.submit(
            request, order.video, force=True, job_dir=order.journal, preview_every=every
        )

    def _opened_for(self, order: Order) -> Engine:
        wanted = (order.model, order.loras, order.cache)
        if self._engine is None or self._opened != wanted:
            self.close()
            options = self._options
            if order.cache is not None:
                options = replace(options, step_cache=order.cache)
            place = self._place(order.model)
            engine = Engine.open(place, loras=order.loras, options=options, cache=self._cache)
            self._engine, self._opened = engine, wanted
        return self._engine

    def _reopened(self, order: Order) -> Engine:
        """As the job was begun, under today's budgets: for this job alone."""
        self.close()
        self._place(order.model)
        own = {name: self._options.given.get(name) for name in ("vram", "ram", "device")}
        opening = opening_of(order.journal, Options(**own))
        self._engine = Engine.reopen(opening, cache=self._cache)
        return self._engine

    def _place(self, model: str) -> str:
        if model not in self._models:
            raise UsageError(
                "this server has no such model",
                expected=", ".join(self._models),
                found=model,
                remedy="Start it with that model, and resume the job.",
            )
        return self._models[model]


class Teller:
    """Makes plain values of a job's events, not more of them than a person can follow.

    Args:
        tell: takes them.
        plan: of the job: how its phases share its time.
    """

    def __init__(self, tell: Tell, plan: Plan) -> None:
        self._tell, self._last_s = tell, 0.0
        self._seconds = {phase.name: phase.seconds for phase in plan.phases}

    def hear(self, event: Event) -> None:
        """Pass an event on."""
        if isinstance(event, Notice | Replanned):
            self._tell({"event": "notice", "message": event.message})
        elif isinstance(event, PhaseStarted):
            self._progress(event.phase, 0, event.total, event.unit)
        elif isinstance(event, PhaseEnded):
            report = event.report
            self._progress(report.name, 1, 1, report.unit)
        elif event.preview is not None or time.monotonic() - self._last_s >= TELL_S:
            self._progress(event.phase, event.step, event.total, event.unit, event)

    def _progress(
        self, phase: str, step: int, total: int, unit: str, event: Progress | None = None
    ) -> None:
        self._last_s = time.monotonic()
        share = step / total if total else 1.0
        before, after = self._around(phase)
        own = self._seconds.get(phase, 0.0)
        whole = before + own + after
        told = {
            "event": "progress",
            "phase": phase,
            "step": step,
            "total": total,
            "unit": unit,
            "progress": min(99, int(100 * (before + share * own) / whole)) if whole else 0,
            "eta_s": (own * (1 - share) if event is None else event.eta_s) + after,
            "vram_bytes": None if event is None else event.vram_bytes,
            "ram_bytes": None if event is None else event.ram_bytes,
            "preview": None if event is None or event.preview is None else jpeg(event.preview),
        }
        self._tell(told)

    def _around(self, phase: str) -> tuple[float, float]:
        """Planned seconds of the phases before and after one."""
        names = list(self._seconds)
        place = names.index(phase) if phase in names else 0
        seconds = list(self._seconds.values())
        return sum(seconds[:place]), sum(seconds[place + 1 :])


def jpeg(preview: Preview) -> str:
    """Return a preview as a JPEG in base64."""
    file = io.BytesIO()
    preview.to_image().save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode("ascii")
