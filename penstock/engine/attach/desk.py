"""The budget of a pipeline that is not ours: what each of its parts may hold, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from penstock.engine.attach.endless import EndlessStream
from penstock.engine.model.component import Component
from penstock.engine.model.files import ModelFiles
from penstock.engine.run.room import Room
from penstock.errors import UsageError
from penstock.offload.layout import BlockLayout
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import SCRATCH, VideoShape
from penstock.profiles.phases import Workload
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from penstock.profiles.planner import plan as make_plan
from penstock.profiles.policy import Policy
from penstock.quant.paths import Computing, Scratch

STEPS = 40
"""Wan's own default: how often residents of the transformer will be used."""

WHOLE_FRAMES = 3
"""What diffusers' own VAE takes where ours takes 1 on whole frames: it runs four frames at a time.
Measured up to 2.6, clips aside; a test holds it."""

UNLIMITED = 1 << 62

Held = TypeVar("Held")


class Desk(Room):
    """Opens what a part needs, and closes what another one has left open.

    Args:
        model: its files.
        hardware: its budgets.

    Attributes:
        whole_blocks: one layout a block of the transformer, cross-attention K/V projections
            included: a pipeline may change its prompts at every step.
    """

    def __init__(self, model: ModelFiles, hardware: Hardware) -> None:
        device = torch.device(hardware.place)
        installed = model.installed(Computing(Scratch(0, device)))
        super().__init__(installed, device, hardware.vram_bytes, hardware.ram_bytes)
        self._hardware = hardware
        self.whole_blocks = _whole_blocks(model.streamed)
        self.read_bytes = self.copied_bytes = 0
        self._plans: dict[VideoShape, Plan] = {}
        self._key: object = None
        self._held: Any = None
        self._stack = ExitStack()
        self._is_open = True

    def plan(self, shape: VideoShape | None = None) -> Plan:
        """Return what a video of ``shape`` takes; None: the smallest, for what no shape changes.

        Raises:
            OverBudget: no plan fits.
        """
        grid = self.model.grid
        shape = shape or VideoShape(grid.side, grid.side, 1)
        if shape not in self._plans:
            # K/V are made block by block and never kept; no branch waits for the other.
            policy = Policy(branches=1, cross_kv="ram", residual="bf16")
            workload = Workload(shape, 2 * STEPS, guided=False, written=False, changes=None)
            blocks = tuple(layout.nbytes for layout in self.whole_blocks)
            manifest = self.model.manifest.with_whole_blocks(blocks, 0)
            roomy = replace(self._hardware, vram_bytes=UNLIMITED)
            context = make_plan(manifest, workload, roomy, policy)["context"]
            manifest = manifest.with_whole_blocks(blocks, _beside_scratch(context))
            self._plans[shape] = make_plan(manifest, workload, self._hardware, policy)
        return self._plans[shape]

    def whole(self, phase: PhasePlan, shape: VideoShape) -> PhasePlan | None:
        """Return a phase of the VAE as diffusers' own forward takes it, on whole frames and several
        at a time; None where the budget does not hold it, and exact tiles must do."""
        itemsize = self.model.manifest.vae.decoder.itemsize
        clip = 3 * shape.frames * shape.height * shape.width * itemsize
        work = (("whole frames", WHOLE_FRAMES * phase.work_bytes), ("clips", 2 * clip))
        found = replace(phase, work=work)
        fits = phase.tiles == (1, 1) and found.vram_bytes <= self.device_ledger.cap_bytes
        return found if fits else None

    def denoise_bytes(self, shape: VideoShape) -> int:
        """Return the activations of the transformer: those of a step, and the context beside it."""
        found = self.plan(shape)
        return found["denoise"].work_bytes + _beside_scratch(found["context"])

    @contextmanager
    def phase(self, phase: PhasePlan) -> Iterator[None]:
        """Keep a part at work from here to the end of the context; no other part holds anything.

        Raises:
            UsageError: the pipeline was detached.
        """
        self.release()
        self._check()
        with self.reserved(phase):
            yield

    def hold(self, key: object, make: Callable[[ExitStack], Held]) -> Held:
        """Return what ``make`` opens, kept open while nothing but ``key`` is asked for."""
        self._check()
        if key != self._key:
            self.release()
            with ExitStack() as stack:
                self._held = make(stack)
                self._stack, self._key = stack.pop_all(), key
        held: Held = self._held
        return held

    def release(self) -> None:
        """Close what is open and give its memory back."""
        self._key = self._held = None
        self._stack.close()
        self._stack = ExitStack()
        release_cached(self.device)

    def close(self) -> None:
        """End it: nothing can be opened any more."""
        self._is_open = False
        self.release()
        self.model.close()

    def _check(self) -> None:
        if not self._is_open:
            raise UsageError(
                "the pipeline was detached",
                expected="a part of an attached pipeline",
                remedy="Attach it again, or use the pipeline's own components.",
            )
        for component in self.model.components():
            component.checkpoint.check_unchanged()

    @contextmanager
    def rest(self, component: Component) -> Iterator[Any]:
        """As `Room.rest`, counted."""
        with super().rest(component) as module:
            self.read_bytes += component.rest.read_bytes
            self.copied_bytes += component.rest.nbytes
            yield module

    @contextmanager
    def stream(
        self, layouts: Sequence[BlockLayout], places: StreamPlan | None
    ) -> Iterator[EndlessStream]:
        """Provide passes over ``layouts``, as many as are asked for."""
        assert places is not None
        with EndlessStream(partial(self.blocks, layouts, places)) as opened:
            try:
                yield opened
            finally:
                opened.close()
                self.read_bytes += opened.read_bytes
                self.copied_bytes += opened.copied_bytes


def _beside_scratch(phase: PhasePlan) -> int:
    return phase.work_bytes - dict(phase.work).get(SCRATCH, 0)


def _whole_blocks(component: Component) -> tuple[BlockLayout, ...]:
    entries = component.source.entries()
    layouts = []
    for index in range(len(component.blocks)):
        start = f"{component.prefix}{index}."
        inside = {key[len(start) :]: e for key, e in entries.items() if key.startswith(start)}
        layouts.append(component.packs.checked(BlockLayout.from_entries(inside)))
    return tuple(layouts)
