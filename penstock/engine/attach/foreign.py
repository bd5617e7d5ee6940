"""A module of somebody else's pipeline: it keeps its class, its forward and its place, while its
weights are where the budget has room for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.blocks import PAGE_BYTES
from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.blocks import Loan, Onloader, Slot, lend
from penstock.engine.attach.fileweights import FileWeights, check_away
from penstock.engine.attach.guard import guard
from penstock.engine.attach.livepack import LivePack, plan_live
from penstock.engine.attach.placing import place_blocks
from penstock.engine.attach.shared import SharedBudget
from penstock.engine.attach.sources import move, run_bytes, storage_bytes
from penstock.engine.attach.supply import Supply
from penstock.engine.attach.surgery import (
    Emptied,
    Patient,
    Quantised,
    restore,
    run_name,
    specs_of,
)
from penstock.engine.packs.file import PackLayout
from penstock.engine.packs.layout import Spec
from penstock.formats.formats import QuantFormat
from penstock.offload.layout import BlockLayout
from penstock.offload.streamer import load_block
from penstock.profiles.hardware import Hardware
from penstock.profiles.plan import Items, StreamPlan
from penstock.quant.paths import Computing, Scratch

OUTSIDE = "outside"
"""The run of a pack that holds what is in no block."""


class ForeignModule:
    """A component that streams its blocks, and has the rest of its weights while it computes.

    Args:
        name: of the component.
        module: loaded.
        budget: of the pipeline.
        fmt: store the linear layers of its blocks in it; None: as they are.
        taken: parameters (by id) that another component has already; they stay.
        files: where its weights lie, if it has none; None: they are in memory.
        work_bytes: of VRAM, for what is computed while it works.

    Attributes:
        name: of the component.
        file_bytes: of its packs.
        weight_bytes: of the weights that leave.

    Raises:
        UsageError: weights that cannot be written as they are; names one.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        budget: SharedBudget,
        fmt: QuantFormat | None,
        taken: Collection[int],
        files: FileWeights | None = None,
        work_bytes: int = 0,
    ) -> None:
        self.name, self._module, self._budget = name, module, budget
        self._files, self._work_bytes = files, work_bytes
        self._patient = Patient(module, None)
        self._quantised = None
        if fmt is not None and self._patient.blocks:
            self._quantised = Quantised(self._patient, fmt, (), self._value)
        self._outside = {
            f"{OUTSIDE}.{key}": p
            for key, p in module.named_parameters()
            if id(p) not in taken and any(p is each for each in self._patient.outside)
        }
        self._runs: dict[str, dict[str, nn.Parameter]] = self._patient.runs()
        if self._outside:
            self._runs[OUTSIDE] = self._outside
        specs = specs_of(self._runs) if files is None else _specs(self._runs, files)
        self._direct = self._read_from_files(files)
        written = {run: own for run, own in specs.items() if run not in self._direct}
        if self._quantised is not None and files is not None:  # plain blocks are not needed
            written = {run: own for run, own in written.items() if run == OUTSIDE}
        self._plain = plan_live(written)
        self._stored = self._plain
        if self._quantised is not None:
            blocks = {run: own for run, own in specs.items() if run != OUTSIDE}
            self._stored = plan_live(self._quantised.specs(blocks))
        stored = _bytes_by_run(self._plain) | _bytes_by_run(self._stored)
        stored |= {
            run: layout.nbytes
            for run, layout in self._direct.items()
            if run == OUTSIDE or self._quantised is None
        }
        self._sizes = [stored[run_name(n)] for n in range(len(self._patient.blocks))]
        self._outside_bytes = stored.get(OUTSIDE, 0)
        packs = {id(each): each.file_bytes for each in (self._plain, self._stored) if each.runs}
        self.file_bytes = sum(packs.values())
        self.weight_bytes = sum(p.nbytes for own in self._runs.values() for p in own.values())
        self._limits: Hardware | None = None
        self._supply: Supply | None = None
        self._onloader: Onloader | None = None
        self._rest: BlockLayout | None = None
        self._rest_slots: list[Slot] = []
        self._held = ExitStack()
        self._loan: Loan | None = None
        self._read = self._copied = 0

    @property
    def fixed(self) -> Items:
        """``(label, bytes)`` that the device holds to the end."""
        made = self._quantised
        device = self._budget.tiers.device.type
        return (
            (f"{self.name}: buffers", storage_bytes(self._staying)),
            (f"{self.name}: dequantisation scratch", 0 if made is None else made.scratch_bytes),
            (f"{self.name}: dequantisation",
             0 if made is None else made.workspace_bytes(device)),
        )  # fmt: skip

    @property
    def _staying(self) -> list[Tensor]:
        leaving = {id(p) for own in self._runs.values() for p in own.values()}
        return [each for each in self._patient.staying if id(each) not in leaving]

    @property
    def whole_bytes(self) -> int:
        """VRAM for all of its weights, the slot through which they may come, and its work."""
        weights = self._outside_bytes + sum(self._sizes) + max(self._sizes, default=0)
        return weights + self._work_bytes

    @property
    def blocks(self) -> int:
        """How many stream."""
        return len(self._sizes)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Bytes of each that streams."""
        return tuple(self._sizes)

    @property
    def outside_bytes(self) -> int:
        """Of what is in no block."""
        return self._outside_bytes

    @property
    def least_vram_bytes(self) -> int:
        """VRAM for one block at a time, and its work."""
        return self._outside_bytes + max(self._sizes, default=0) + self._work_bytes

    @property
    def least_ram_bytes(self) -> int:
        """RAM for one block at a time."""
        return max(max(self._sizes, default=0), PAGE_BYTES if self._outside_bytes else 0)

    @property
    def read_bytes(self) -> int:
        """From disk to RAM, so far."""
        return self._read + (0 if self._supply is None else self._supply.read_bytes)

    @property
    def copied_bytes(self) -> int:
        """From RAM to VRAM, so far."""
        return self._copied + (0 if self._supply is None else self._supply.copied_bytes)

    def empty(self, folder: Path, stack: ExitStack, returns: Callable[[], bool]) -> None:
        """Write the weights to ``folder`` and let them go; ``stack`` undoes it.

        Args:
            returns: whether the weights are wanted back in the end.

        Raises:
            StorageError: the disk is full or fails.
        """
        device, patient = self._budget.tiers.device, self._patient
        plain = None
        if self._plain.runs:
            plain = LivePack(folder / f"{self.name}.safetensors", self._plain, self._values)
            stack.callback(plain.close)
        stored = plain
        if self._quantised is not None:
            path = folder / f"{self.name}.quantised.safetensors"
            stored = LivePack(path, self._stored, self._quantised.values)
            stack.callback(stored.close)
            stack.callback(self._quantised.remove)
            scratch = Scratch(self._quantised.scratch_bytes, device)
            self._quantised.install(Computing(scratch), device)
        slots = [patient.slots(index, device) for index in range(len(patient.blocks))]
        if self._quantised is not None:
            slots = [own + self._quantised.slots(n, device) for n, own in enumerate(slots)]
        self._rest_slots = _outside_slots(self._module, self._outside, device, self.name)
        if plain is not None and self._files is None:
            emptied = Emptied(plain, self._runs)
            stack.callback(lambda: emptied.fill() if returns() else None)
        everything = [*slots, self._rest_slots]
        stack.callback(lambda: restore(everything) if returns() else None)
        for own in everything:
            for slot in own:
                slot.put(None)
        move(self._staying, device, stack)
        if self._outside:
            self._rest = self._layout(OUTSIDE, plain)
        layouts = [self._layout(run_name(n), stored) for n in range(len(patient.blocks))]
        if layouts:
            known = patient.lists == 1
            self._supply = Supply(layouts, self._budget.tiers, self._placed, known=known)
            self._onloader = Onloader(slots, self._supply)
            stack.callback(self._onloader.watch(self._module))
        stack.callback(self.release)
        stack.callback(lend(self._fetches(slots)))
        guard(self._module, "attach", stack, self._budget.release)

    def _values(self, run: str) -> Iterator[Tensor]:
        yield from map(self._value, self._runs[run].values())

    def _value(self, weight: Tensor) -> Tensor:
        return weight if self._files is None else self._files.value(weight)

    def _read_from_files(self, files: FileWeights | None) -> dict[str, BlockLayout]:
        """Return what needs no pack, by run: where the files hold it as it is used."""
        return {
            run: BlockLayout.from_entries({name: files.entries[id(p)] for name, p in own.items()})
            for run, own in self._runs.items()
            if files is not None and all(map(files.is_stored_so, own.values()))
        }

    def _layout(self, run: str, pack: LivePack | None) -> BlockLayout:
        if run in self._direct and (run == OUTSIDE or self._quantised is None):
            return self._direct[run]
        assert pack is not None
        return BlockLayout.from_entries(pack.entries(run))

    def _fetches(self, slots: list[list[Slot]]) -> Iterator[tuple[Slot, Callable[[], None]]]:
        for index, own in enumerate(slots):
            for slot in own:
                yield slot, partial(self._onload, index)
        for slot in self._rest_slots:
            yield slot, self._enter

    def _enter(self) -> None:
        self._budget.enter(self)

    def _onload(self, index: int) -> None:
        self._enter()
        assert self._onloader is not None
        self._onloader.onload(index)

    def open(self, limits: Hardware) -> None:
        """Bring what is in no block, and begin to bring the blocks."""
        tiers = self._budget.tiers
        taken = self._outside_bytes + self._work_bytes
        self._limits = replace(limits, vram_bytes=limits.vram_bytes - taken)
        with ExitStack() as stack:
            stack.enter_context(tiers.vram.reserve(f"{self.name}: activations", self._work_bytes))
            if self._rest is not None:
                tensors = stack.enter_context(
                    load_block(
                        self._rest,
                        device=tiers.device,
                        device_ledger=tiers.vram,
                        host_ledger=tiers.ram,
                    )
                )
                self._loan = Loan(self._rest_slots, tensors)
                stack.callback(self._return_loan)
                self._read += self._rest.read_bytes
                self._copied += self._rest.nbytes
            if self._supply is not None:
                assert self._onloader is not None
                stack.enter_context(self._supply)
                stack.callback(self._onloader.take_back)
                self._supply.open()
            self._held = stack.pop_all()

    def _placed(self, sizes: Sequence[int]) -> StreamPlan:
        assert self._limits is not None
        return place_blocks(sizes, (), self._limits)

    def _return_loan(self) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.end()

    def release(self) -> None:
        """Give all memory back.

        Raises:
            UsageError: a weight was written to, which would be lost.
        """
        loan = self._loan
        try:
            if loan is not None:
                loan.check()
        finally:
            self._held.close()


def _specs(
    runs: Mapping[str, Mapping[str, Tensor]], files: FileWeights
) -> dict[str, dict[str, Spec]]:
    for own in runs.values():
        check_away(own)
    return {run: {name: files.spec(p) for name, p in own.items()} for run, own in runs.items()}


def _bytes_by_run(layout: PackLayout) -> dict[str, int]:
    names = [run.name for run in layout.runs]
    return dict(zip(names, run_bytes(layout), strict=True))


def _outside_slots(
    module: nn.Module, outside: Mapping[str, nn.Parameter], device: torch.device, name: str
) -> list[Slot]:
    keys = {id(p): key for key, p in outside.items()}
    return [
        Slot(owner, leaf, keys[id(p)], AwayWeight(p, device, f"{name}: {keys[id(p)]}"), p)
        for owner in module.modules()
        for leaf, p in owner._parameters.items()
        if p is not None and id(p) in keys
    ]


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the torch modules among the components of a pipeline, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, each in pipe.components.items():
        if isinstance(each, nn.Module):
            found.setdefault(id(each), (name, each))
    return dict(found.values())
