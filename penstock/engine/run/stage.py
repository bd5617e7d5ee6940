"""What the phases of a job share: what it is made of, its ledgers, and how weights come and go."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from penstock.engine.model.component import Component
from penstock.engine.model.files import ModelFiles
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.run.events import Listener, Monitor, PhaseMonitor, Replanned
from penstock.engine.run.keeper import Keeper
from penstock.engine.run.prefetch import Prefetcher
from penstock.engine.run.preview import Previewer
from penstock.engine.run.recovery import MEMORY_ERRORS, Shortage, shortage
from penstock.engine.run.room import Room
from penstock.engine.run.steering import Hooks
from penstock.errors import OutOfMemory
from penstock.offload.layout import BlockLayout
from penstock.offload.streamer import BlockStream, Tensors
from penstock.offload.tiers import release_cached
from penstock.profiles.caching import SURE
from penstock.profiles.phases import RESTORED
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan, changes

log = logging.getLogger(__name__)

ONE_RESIDENT = StreamPlan(1, 1, 0, 0, 1)
"""A network of one block, which comes through a staging buffer and stays on the device."""

Result = TypeVar("Result")
Shrink = Callable[[Plan, str, str], "Plan | None"]


def nothing_smaller(plan: Plan, phase: str, resource: str) -> Plan | None:
    """Return the `Shrink` of a job that runs as planned or not at all."""
    return None


@dataclass(frozen=True)
class Run:
    """All that a job is made of.

    Attributes:
        overlapped: stream ahead of the computation (else the sequential reference).
        output: where the mp4 goes; None: decode, but write nothing.
        metadata: prompt and settings go into the file.
        prepare: gives the model to read weights from, if that is not ``model`` (whose pack may have
            to be made first).
        shrink: a plan that takes less of a resource in a phase, or None where there is none.
        keeper: what is kept of the job while it runs.
        notices: told at the start.
        hooks: what its user wants to see and do between steps.
        previewer: makes previews.
        sources: all files that the result depends on, by their names in the fingerprint.
        imports_s: seconds that imports have taken before it.
    """

    model: ModelFiles
    request: GenerationRequest
    plan: Plan
    device: torch.device
    overlapped: bool
    output: Path | None
    overwrite: bool
    metadata: bool
    prepare: Callable[[Stage], ModelFiles] | None = None
    shrink: Shrink = nothing_smaller
    keeper: Keeper = field(default_factory=Keeper)
    notices: tuple[str, ...] = ()
    hooks: Hooks = field(default_factory=Hooks)
    previewer: Previewer = field(default_factory=Previewer)
    sources: Mapping[str, Path] = field(default_factory=dict)
    imports_s: float = 0.0


class Stage(Room):
    """A running job: the run, its plan as it stands, its room and its monitor.

    Attributes:
        computed_steps: of the denoising, once it is done: the others were skipped.
        forwards_left: of the denoising, when its stream is opened: that are sure to come, and the
            most; None: it begins as planned.
    """

    def __init__(self, job: Run, listener: Listener, cancelled: threading.Event) -> None:
        limits = job.plan.vram_limit_bytes, job.plan.ram_limit_bytes
        super().__init__(job.model, job.device, *limits)
        self.job, self.plan, self.keeper = job, job.plan, job.keeper
        self._active = ""
        self._prefetched = Prefetcher()
        self.computed_steps: tuple[int, ...] = ()
        self.forwards_left: tuple[int, int] | None = None
        self.monitor = Monitor(listener, self.device_ledger, self.host_ledger, cancelled)

    def prepare(self) -> None:
        """From now on the weights are where the job reads them."""
        if self.job.prepare is not None:
            self.model = self.job.prepare(self)

    @contextmanager
    def phase(
        self, name: str, total: int, unit: str, *, done: int = 0, plan: PhasePlan | None = None
    ) -> Iterator[tuple[PhasePlan, PhaseMonitor]]:
        """Provide one phase of the plan (or of ``plan``), its room reserved; ``done`` units were
        finished before."""
        plan = plan or self.plan[name]
        self._active = name
        if self.device.type == "cuda":  # holes that the last phase has left are no use to this one
            release_cached(self.device)
        with (
            self.monitor.phase(plan, total, unit, done) as phase,
            self.reserved(plan),
        ):
            if plan.prefetch_bytes:
                self._prefetch_blocks()
            yield plan, phase

    def _prefetch_blocks(self) -> None:
        """Let the transformer's first blocks come, as far as its buffers in RAM go."""
        what = self.model.manifest.prefetch
        branches = workload_of(self.job.request).branches_of(first=True)
        forwards = self.forwards_left or self.forwards_of(what.stream)
        self._prefetch_stream(what.stream, what.blocks_of, forwards, branches)

    def forwards_of(self, name: str) -> tuple[int, int]:
        """Return forwards of a whole phase of denoising, before it has begun: that are sure to
        come, and the most."""
        fewest, most = self.plan[name].forwards
        most = most or self.job.request.steps  # a plan of a job from before they were counted
        return (most if fewest in (0, most) else min(SURE, most)), most

    def _prefetch_stream(
        self, name: str, blocks_of: str, forwards: tuple[int, int], branches: int
    ) -> None:
        phase, blocks = self.plan[name], self.model.parts[blocks_of].blocks
        if self._prefetched.is_reading or not self.job.overlapped or phase.stream is None:
            return
        fewest = workload_of(self.job.request).fewest_branches
        log.debug("%s prefetches blocks of %s", self._active, name)
        most = forwards[1] * len(phase.passes(branches))
        sure = forwards[0] * len(phase.passes(min(fewest, branches)))
        self._prefetched.begin(blocks, self._open(blocks, phase.stream, most, sure))

    def prefetch_after(self, name: str) -> None:
        """In the last step of the phase ``name``, let come what is computed with after it: the
        blocks of the transformer that goes on, or the VAE decoder's weights; where the plan has
        room for them already now.

        Raises:
            LedgerOverflow: the buffers do not fit the budget.
        """
        what = self.model.manifest.prefetch
        if name != what.last_stream and what.then in [phase.name for phase in self.plan.phases]:
            if self.plan[name].prefetched_next_bytes:
                work = workload_of(self.job.request)
                forwards = self.forwards_of(what.then)
                self._prefetch_stream(what.then, what.then_of, forwards, work.branches)
            return
        planned = self.plan[name].prefetched_weights_bytes
        if planned and self.job.overlapped and not self._prefetched.is_reading:
            layouts = (self.model.parts[what.weights_of].rest,)
            self._prefetched.begin(layouts, self._open(layouts, ONE_RESIDENT, 1))

    def close(self) -> None:
        """Give back what was read ahead for a phase that did not come."""
        self._prefetched.drop()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Room for reading what was kept of the job, as the first phase that plans it has it."""
        planned = (dict(phase.ram_work).get(RESTORED, 0) for phase in self.plan.phases)
        nbytes = next(filter(None, planned), 0)
        with self.host_ledger.reserve(RESTORED, nbytes):
            yield

    def attempt(self, name: str, body: Callable[[], Result]) -> Result:
        """Do ``body``, and where memory runs out do it again under a smaller plan.

        Every plan takes strictly less than the one before, so that the attempts come to an end.

        Args:
            name: the phase that a shortage before any phase began is put down to.
            body: leaves nothing behind when it fails.

        Raises:
            OutOfMemory: no smaller plan exists.
        """
        while True:
            self._active = name
            try:
                return body()
            except MEMORY_ERRORS as error:
                short = shortage(error, self.device)
                if short is None:
                    raise
            self._shrink(short)

    def _shrink(self, short: Shortage) -> None:
        log.info("%s ran out in %s: %s", short.resource, self._active, short.message)
        self._prefetched.drop()
        gc.collect()
        release_cached(self.device)
        plan = self.job.shrink(self.plan, self._active, short.resource)
        if plan is None:
            raise OutOfMemory(
                f"out of memory in the phase {self._active}, and nothing smaller can be planned",
                found=short.message,
                remedy="Free memory (close other programs), or give a smaller --vram or --ram.",
            )
        what, identical = changes(self.plan, plan)
        self.plan = plan
        self.keeper.save_plan(plan)
        self.monitor.replanned(Replanned(self._active, short.message, what, identical))

    @contextmanager
    def loaded(self, layout: BlockLayout) -> Iterator[Tensors]:
        """Weights on the device: read now, or taken from where they were read ahead."""
        with ExitStack() as stack:
            prefetched = self._prefetched.take((layout,), stack)
            if prefetched is None:
                yield stack.enter_context(super().loaded(layout))
            else:
                stack.enter_context(prefetched)
                for _, tensors in prefetched.forward_pass():
                    yield tensors

    @contextmanager
    def stream(
        self,
        layouts: Sequence[BlockLayout],
        plan: StreamPlan | None,
        phase: PhaseMonitor,
        passes: int,
        sure: int | None = None,
    ) -> Iterator[BlockStream]:
        """Provide a stream over ``layouts`` as planned, its statistics joined to the phase's."""
        assert plan is not None
        with ExitStack() as stack:
            prefetched = self._prefetched.take(layouts, stack)
            stream = prefetched or self._open(layouts, plan, passes, sure)
            stack.enter_context(stream)
            phase.opened(stream.stats)
            for message in stream.notices:
                self.monitor.notice(message)
            yield stream

    def _open(
        self,
        layouts: Sequence[BlockLayout],
        plan: StreamPlan,
        passes: int,
        sure: int | None = None,
    ) -> BlockStream:
        overlapped, check = self.job.overlapped, self.monitor.check
        return self.blocks(
            layouts, plan, passes, overlapped=overlapped, sure=sure, should_stop=check
        )


def visits(
    stream: BlockStream, component: Component, phase: PhaseMonitor
) -> Iterator[tuple[int, Any]]:
    """Yield one pass over all blocks: each index with the block module, its weights bound
    meanwhile."""
    for index, tensors in stream.forward_pass():
        phase.check()
        with component.bound(tensors, index) as block:
            yield index, block
