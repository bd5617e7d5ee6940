"""The memory in which phases work, of a job or of a pipeline that is not ours: what each phase
reserves, and how weights come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from penstock.engine.model.component import Component
from penstock.engine.model.files import ModelFiles
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Residency
from penstock.offload.streamer import BlockStream, Tensors, load_block
from penstock.profiles.manifest import SCRATCH
from penstock.profiles.plan import PhasePlan, StreamPlan


class Room:
    """A device and host memory, each with a ledger in which everything is reserved first.

    Args:
        model: whose weights come and go.
        device: where is computed.
        vram_bytes, ram_bytes: the budgets.

    Attributes:
        device_ledger, host_ledger: of the two memories.
    """

    def __init__(
        self, model: ModelFiles, device: torch.device, vram_bytes: int, ram_bytes: int
    ) -> None:
        self.model, self.device = model, device
        self.device_ledger = ByteLedger("VRAM", vram_bytes)
        self.host_ledger = ByteLedger("RAM", ram_bytes)

    @contextmanager
    def reserved(self, phase: PhasePlan) -> Iterator[None]:
        """Provide what ``phase`` takes besides weights.

        Raises:
            LedgerOverflow: it does not fit the budgets.
        """
        with (
            self.device_ledger.reserve(f"{phase.name}: activations", phase.work_bytes),
            self.host_ledger.reserve(f"{phase.name}: host work", phase.ram_work_bytes),
            self.scratch(phase),
        ):
            yield

    def scratch(self, phase: PhasePlan) -> AbstractContextManager[None]:
        """Return the buffer that quantised weights are decoded into, while ``phase`` works."""
        return self.model.scratch.held(dict(phase.work).get(SCRATCH, 0))

    @contextmanager
    def rest(self, component: Component) -> Iterator[Any]:
        """Provide the network of ``component`` with all that is not in a block loaded.

        Raises:
            CheckpointChanged: its files changed since the model was opened.
            LedgerOverflow: it does not fit the budgets.
        """
        component.checkpoint.check_unchanged()
        with (
            self.loaded(component.rest) as tensors,
            self.device_ledger.reserve("adapted weights", component.made_bytes(self.device.type)),
            component.bound(tensors) as module,
        ):
            yield module

    def loaded(self, layout: BlockLayout) -> AbstractContextManager[Tensors]:
        """Return the weights on the device, read now."""
        return load_block(
            layout,
            device=self.device,
            device_ledger=self.device_ledger,
            host_ledger=self.host_ledger,
        )

    def blocks(
        self,
        layouts: Sequence[BlockLayout],
        plan: StreamPlan,
        passes: int,
        *,
        overlapped: bool = True,
        sure: int | None = None,
        should_stop: Callable[[], None] = lambda: None,
    ) -> BlockStream:
        """Return a stream over ``layouts`` as planned, to be entered.

        Args:
            passes, overlapped, sure, should_stop: as `BlockStream` has them.
        """
        return BlockStream(
            layouts,
            residency(plan),
            passes=passes,
            device=self.device,
            device_ledger=self.device_ledger,
            host_ledger=self.host_ledger,
            overlapped=overlapped,
            sure=sure,
            should_stop=should_stop,
        )


def residency(plan: StreamPlan) -> Residency:
    """Return the plan's places, as the stream takes them."""
    on_device, in_ram = plan.device_blocks, plan.host_blocks
    return Residency(plan.n_blocks, on_device, in_ram, plan.device_slots, plan.staging_buffers)
