"""What a job tells while it runs: typed events, and the monitor through which it tells them.

The pipeline calls the monitor between units of work (a block, a tile, a step); that is also where a
cancel takes effect.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from penstock.engine.run.preview import Preview
from penstock.engine.run.report import PhaseReport, StepReport
from penstock.errors import JobCancelled
from penstock.offload.ledger import ByteLedger
from penstock.offload.stats import Flow, StreamStats
from penstock.profiles.plan import PhasePlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins.

    Attributes:
        phase: its name.
        total: units of work that it has.
        unit: what a unit is: "step", "layer", "block", "frame".
    """

    phase: str
    total: int
    unit: str


@dataclass(frozen=True)
class Progress:
    """``step`` of ``total`` units of work are finished; bytes as the ledgers hold them now.

    Attributes:
        phase: such as "denoise"; `unit` names what it counts ("step", "layer", "block", "frame").
        step: units finished, those of an earlier process included.
        total: units of the phase.
        seconds_per_unit: mean over the units finished so far.
        eta_s: seconds until the phase ends at that pace.
        vram_bytes, ram_bytes: held now.
        stall_s: seconds in which the computation has waited for weights in this phase.
        preview: a small picture, with the denoising steps that were asked for one.
    """

    phase: str
    step: int
    total: int
    unit: str
    seconds_per_unit: float
    eta_s: float
    vram_bytes: int
    ram_bytes: int
    stall_s: float
    preview: Preview | None = None


@dataclass(frozen=True)
class PhaseEnded:
    """A phase is over.

    Attributes:
        report: its figures.
    """

    report: PhaseReport

    @property
    def phase(self) -> str:
        """Its name."""
        return self.report.name


@dataclass(frozen=True)
class Notice:
    """Something the user should know: a cut prompt, a platform feature that is missing.

    Attributes:
        message: one sentence.
    """

    message: str


@dataclass(frozen=True)
class Replanned:
    """Memory ran out, and the job goes on under a smaller plan.

    Attributes:
        phase: where it ran out.
        reason: what was reported.
        changes: what the new plan does otherwise.
        identical: the result is the same to the bit.
    """

    phase: str
    reason: str
    changes: tuple[str, ...]
    identical: bool

    @property
    def message(self) -> str:
        """All of it in a line."""
        effect = (
            "the result stays the same to the bit"
            if self.identical
            else "the result can differ by rounding"
        )
        return f"{self.phase}: {self.reason}; going on with {', '.join(self.changes)} ({effect})"


Event = PhaseStarted | Progress | PhaseEnded | Notice | Replanned
Listener = Callable[[Event], None]


class Monitor:
    """The pipeline's line to the outside: phases, units of work, notices, and the cancel flag.

    Args:
        listener: receives every event, on the job's own thread.
        device_ledger: counts the bytes on the device.
        host_ledger: counts the bytes in host memory.
        cancelled: set by another thread to stop the job at the next unit of work.
    """

    def __init__(
        self,
        listener: Listener,
        device_ledger: ByteLedger,
        host_ledger: ByteLedger,
        cancelled: threading.Event,
    ) -> None:
        self._listener = listener
        self.device_ledger = device_ledger
        self.host_ledger = host_ledger
        self._cancelled = cancelled
        self.phases: list[PhaseReport] = []
        self.notices: list[str] = []

    def check(self) -> None:
        """Raise JobCancelled if the job was asked to stop. Called between blocks and tiles."""
        if self._cancelled.is_set():
            raise JobCancelled("the job was cancelled", remedy="Nothing was written.")

    def notice(self, message: str, level: int = logging.INFO) -> None:
        """Tell the user something, and keep it for the report; in a log it is of ``level``."""
        log.log(level, "note: %s", message)
        self.notices.append(message)
        self._listener(Notice(message))

    def replanned(self, event: Replanned) -> None:
        """Tell of a smaller plan, and keep it for the report."""
        log.info("%s, identical: %s", event.message, event.identical)
        self.notices.append(event.message)
        self._listener(event)

    @contextmanager
    def phase(
        self, plan: PhasePlan, total: int, unit: str, done: int = 0
    ) -> Iterator[PhaseMonitor]:
        """Announce a phase, measure it, and report it beside what ``plan`` predicted.

        ``done`` units were finished by an earlier process or attempt.
        """
        self.check()
        log.info("begins at %d of %d %ss, planned as %s", done, total, unit, plan)
        self._listener(PhaseStarted(plan.name, total, unit))
        self.device_ledger.reset_peak()
        self.host_ledger.reset_peak()
        monitor = PhaseMonitor(self, plan.name, total, unit, done, done)
        yield monitor
        flow = monitor.flow()
        report = PhaseReport(
            name=plan.name,
            seconds=monitor.elapsed_s(),
            units=monitor.done - monitor.before,
            unit=unit,
            predicted_vram_bytes=plan.vram_bytes,
            measured_vram_bytes=self.device_ledger.peak,
            predicted_ram_bytes=plan.ram_bytes,
            measured_ram_bytes=(
                self.host_ledger.peak if monitor.took_bytes is None else monitor.took_bytes
            ),
            read_bytes=flow.disk_to_host.nbytes,
            copied_bytes=flow.host_to_device.nbytes,
            stall_s=flow.device_to_compute.starved_s,
            flow=flow,
            steps=tuple(monitor.steps),
        )
        log.info("ended: %s", report)
        self.phases.append(report)
        self._listener(PhaseEnded(report))

    def tell(self, event: Event) -> None:
        """Pass an event on to the listener."""
        self._listener(event)


@dataclass
class PhaseMonitor:
    """Progress within one phase; ``streams`` are the statistics of the streams it has opened.

    ``before`` of the ``done`` units were finished by an earlier process or attempt. ``took_bytes``
    is host memory as it was measured, where the ledger holds an allowance instead.
    """

    monitor: Monitor
    name: str
    total: int
    unit: str
    done: int = 0
    before: int = 0
    streams: list[StreamStats] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    took_bytes: int | None = None
    _started: float = field(default_factory=time.perf_counter)
    _told: StepReport = StepReport(0.0, Flow())

    def elapsed_s(self) -> float:
        """Return the seconds since the phase began."""
        return time.perf_counter() - self._started

    def stall_s(self) -> float:
        """Return the seconds in which the computation has waited for weights."""
        return sum(stats.compute_wait_s for stats in self.streams)

    def flow(self) -> Flow:
        """Return what has passed the edges between the tiers so far."""
        return sum((stats.flow() for stats in self.streams), Flow())

    def opened(self, stats: StreamStats) -> None:
        """Note that a stream was opened; what it has moved by now belongs to no step."""
        self.streams.append(stats)
        self._told = replace(self._told, flow=self.flow())

    def check(self) -> None:
        """Raise JobCancelled if the job was asked to stop."""
        self.monitor.check()

    def advance(self, preview: Preview | None = None) -> None:
        """Count one more unit of work as finished."""
        self.done += 1
        if self.unit == "step":
            self._note_step()
        pace = self.elapsed_s() / (self.done - self.before)
        self.monitor.tell(
            Progress(
                phase=self.name,
                step=self.done,
                total=self.total,
                unit=self.unit,
                seconds_per_unit=pace,
                eta_s=pace * (self.total - self.done),
                vram_bytes=self.monitor.device_ledger.used,
                ram_bytes=self.monitor.host_ledger.used,
                stall_s=self.stall_s(),
                preview=preview,
            )
        )
        self.check()

    def _note_step(self) -> None:
        now = StepReport(self.elapsed_s(), self.flow())
        last, self._told = self._told, now
        self.steps.append(StepReport(now.seconds - last.seconds, now.flow - last.flow))
