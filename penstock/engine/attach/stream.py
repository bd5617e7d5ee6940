"""Any torch module with a list of blocks, under a budget: `penstock.stream`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penstock.closing import Closing
from penstock.engine.attach.blocks import Onloader, Slot, lend
from penstock.engine.attach.filenames import tie
from penstock.engine.attach.guard import check_runnable, guard
from penstock.engine.attach.livepack import LivePack, live_folder, plan_live
from penstock.engine.attach.placing import place_blocks
from penstock.engine.attach.sources import Filed, Held, Source, layouts_of, run_bytes
from penstock.engine.attach.supply import Supply, Tiers
from penstock.engine.attach.surgery import Patient, Quantised, restore
from penstock.errors import UsageError
from penstock.formats.formats import get_format
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware, probe
from penstock.profiles.plan import Items, StreamPlan
from penstock.quant.paths import Computing, Scratch
from penstock.units import parse_bytes


@dataclass(frozen=True)
class StreamReport:
    """What a streamed module holds and has moved; all sizes in bytes.

    Attributes:
        blocks, device_resident, host_resident, from_disk: how many there are, stay in VRAM, stay in
            RAM, and are read from disk at every pass.
        format: of the linear layers in the blocks; None: as they were.
        weight_bytes: of the blocks' weights as they were.
        streamed_bytes: of all blocks as they are streamed.
        vram_limit_bytes, peak_vram_bytes: the budget and the most that was reserved of it.
        ram_limit_bytes, peak_ram_bytes: likewise.
        disk_bytes: of the pack of the module's weights, and of the quantised one.
        read_bytes, copied_bytes: moved so far from disk to RAM, and from RAM to VRAM.
        passes: over all blocks, so far.
        skipped: blocks that were brought in vain, because the module uses them in another order.
    """

    blocks: int
    device_resident: int
    host_resident: int
    from_disk: int
    format: str | None
    weight_bytes: int
    streamed_bytes: int
    vram_limit_bytes: int
    peak_vram_bytes: int
    ram_limit_bytes: int
    peak_ram_bytes: int
    disk_bytes: int
    read_bytes: int
    copied_bytes: int
    passes: int
    skipped: int


def stream(
    module: nn.Module,
    blocks: str | Sequence[str],
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    format: str | None = None,
    keep: Collection[str] = (),
    activations: str | int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    files: str | Path | None = None,
) -> Streamed:
    """Run a module whose blocks do not fit: they are brought to the device one after the other.

    The module is used as before, under ``torch.no_grad()``. A block's weights are brought in when
    one of them is used, and read ahead in the order in which they are; no class and no forward is
    changed. While it is
    streamed, the blocks' weights live in a pack on disk and, as far as the budgets go, in RAM and
    VRAM; the module's own copies are let go, and come back, in the same parameters, with
    :meth:`Streamed.close`. Results are those of the resident module, bit for bit, unless ``format``
    is given, or weights mapped from a file lie off boundaries of 16 bytes, by which some CPUs'
    matrix products round. What is outside the blocks, all buffers, and weights that are used both
    in a block and elsewhere stay on the device.

    Args:
        module: any module; its weights must be loaded, or lie in ``files``.
        blocks: dotted name of the `nn.ModuleList`, such as ``"encoder.layers"``; or of several, in
            any order: that of their use, blocks of one list between those of another if need be,
            is learnt from the first call, which reads nothing ahead.
        vram: budget on the device, such as ``"4GiB"`` or bytes; None: what is free, and what the
            module takes there now.
        ram: budget of host memory for blocks; None: what is free.
        format: store the blocks' linear layers in it: ``"int8"``, ``"fp8"``, ``"nf4"``, ...
        keep: ends of names of linear layers that are not quantised, such as ``"wo"``.
        activations: bytes of ``vram`` to leave to the module's own computation, which is not known
            here; on a GPU with what cuBLAS and cuDNN work in (8 to 32 MiB and more).
        device: "cuda", "cpu" or "auto" (CUDA where there is one).
        folder: where the pack is written; None: penstock's cache folder. It is removed at the end.
        files: a safetensors file, an index or a folder with either, where the weights of a module
            lie that is on the meta device (its buffers computed, as under
            ``accelerate.init_empty_weights(include_buffers=False)``). They go from the files to the
            stream in the types that they are stored in, and the module is never held whole; no pack
            is written but a quantised one. `Streamed.close` leaves the module on the meta device.

    Raises:
        UsageError: no such list, or weights that cannot be streamed.
        CheckpointError: ``files`` lack weights, or hold other ones.
        OverBudget: not even one block fits; names the least budget that does.
        StorageError: no disk space for the pack.

    Example:
        >>> with penstock.stream(model, "encoder.layers", vram="2GiB", ram="8GiB") as streamed:
        ...     with torch.no_grad():
        ...         states = model(ids)
    """
    check_runnable(module, type(module).__name__)
    hardware = budgets(device, vram, ram)
    if vram is None:  # what the module holds there is the budget's to place
        hardware = replace(hardware, vram_bytes=hardware.vram_bytes + held_bytes(module, hardware))
    work_bytes = parse_bytes(activations) if activations else 0
    with ExitStack() as stack:
        if files is not None:
            tie(module)
        patient = Patient(module, [blocks] if isinstance(blocks, str) else blocks)
        source: Source = (
            Held(patient) if files is None else Filed(patient, module, Path(files), stack)
        )
        quantised = None
        if format is not None:
            quantised = Quantised(patient, get_format(format), keep, source.value)
        opening = _Opening(patient, quantised, hardware, work_bytes, source)
        onloader, report = opening.open(stack, None if folder is None else Path(folder))
        streamed = Streamed(module, report, stack.pop_all())
        onloader.owner = streamed  # whoever keeps the module keeps what can put it back
        return streamed


class Streamed(Closing):
    """A module that is being streamed; a context manager that ends with :meth:`close`.

    Attributes:
        module: the module, to be used as before.
    """

    def __init__(
        self, module: nn.Module, report: Callable[[], StreamReport], stack: ExitStack
    ) -> None:
        self.module = module
        self._report, self._stack = report, stack
        close_at_exit(self)

    @property
    def report(self) -> StreamReport:
        """What it holds, and what has moved so far."""
        return self._report()

    def close(self) -> None:
        """Put everything back: the list, the layers, the weights in their parameters, the device.

        Ends all threads and removes the pack. A second call does nothing.

        Raises:
            CheckpointError: the disk has damaged the pack; names the blocks.
        """
        self._stack.close()

    def __del__(self) -> None:
        """Threads would wait for ever for a module that nobody has any more."""
        self.close()


def close_at_exit(closing: Any) -> None:
    """Call ``closing.close()`` when the interpreter ends, if it is still there.

    The streamer's threads wait for work, and `concurrent.futures` waits for its threads before
    anything registered with `atexit` runs: only what `threading` calls earlier can end them.
    """
    alive = weakref.ref(closing)

    def close() -> None:
        found = alive()
        if found is not None:
            found.close()

    threading._register_atexit(close)  # type: ignore[attr-defined]


def budgets(device: str, vram: str | int | None, ram: str | int | None) -> Hardware:
    """Return this machine, with what was given in the place of what is free.

    Raises:
        UsageError: an unknown device or an illegal size.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError("unknown device", expected="auto, cuda or cpu", found=repr(device))
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    found = probe(auto if device == "auto" else device)
    return replace(
        found,
        vram_bytes=found.vram_bytes if vram is None else parse_bytes(vram),
        ram_bytes=found.ram_bytes if ram is None else parse_bytes(ram),
    )


class _Opening:
    """The way from a module to a streamed one; a stack undoes every step."""

    def __init__(
        self,
        patient: Patient,
        quantised: Quantised | None,
        hardware: Hardware,
        work_bytes: int,
        source: Source,
    ) -> None:
        self._patient, self._source, self._quantised = patient, source, quantised
        self._hardware, self._device = hardware, torch.device(hardware.place)
        self._stored = None if quantised is None else plan_live(quantised.specs(source.specs))
        self._blocks = source.block_bytes if self._stored is None else run_bytes(self._stored)
        self._scratch_bytes = 0 if quantised is None else quantised.scratch_bytes
        workspace = 0 if quantised is None else quantised.workspace_bytes(hardware.device)
        self._fixed: Items = (
            ("weights outside the blocks, and buffers", source.staying_bytes),
            ("dequantisation scratch", self._scratch_bytes),
            ("dequantisation", workspace),
            ("activations", work_bytes),
        )
        self._plan = self._placed(self._blocks)
        self._vram = ByteLedger("VRAM", hardware.vram_bytes)
        self._ram = ByteLedger("RAM", hardware.ram_bytes)

    def open(
        self, stack: ExitStack, folder: Path | None
    ) -> tuple[Onloader, Callable[[], StreamReport]]:
        """Do it all; what comes back brings in the blocks, and reports."""
        stack.callback(release_cached, self._device)
        place = stack.enter_context(live_folder(folder))
        self._source.open(stack, place)
        layouts = self._source.layouts()
        if self._quantised is not None and self._stored is not None:
            made = self._quantised.values
            pack = LivePack(place / "quantised.safetensors", self._stored, made)
            stack.callback(pack.close)
            layouts = layouts_of(pack, len(self._patient.blocks))
        for label, nbytes in self._fixed:
            stack.enter_context(self._vram.reserve(label, nbytes))
        weight_bytes = self._patient.weight_bytes
        slots = self._empty(stack)
        self._source.settle(self._device, stack)
        tiers = Tiers(self._device, self._vram, self._ram)
        # Who names one list has named the order.
        known = self._patient.lists == 1
        supply = stack.enter_context(Supply(layouts, tiers, self._placed, known=known))
        supply.open()
        onloader = Onloader(slots, supply)
        stack.callback(lend(onloader.fetches()))
        stack.callback(onloader.take_back)
        stack.callback(onloader.watch(self._patient.module))
        self._patient.fix_lists(stack)
        guard(self._patient.module, "stream", stack)
        return onloader, lambda: self._report(supply, weight_bytes)

    def _empty(self, stack: ExitStack) -> list[list[Slot]]:
        """Let the weights go; what stands for them is in place then."""
        patient, quantised = self._patient, self._quantised
        if quantised is not None:
            stack.callback(quantised.remove)
            quantised.install(Computing(Scratch(self._scratch_bytes, self._device)), self._device)
        slots = [patient.slots(index, self._device) for index in range(len(patient.blocks))]
        if quantised is not None:
            slots = [own + quantised.slots(n, self._device) for n, own in enumerate(slots)]
        self._source.empty(stack)
        stack.callback(restore, slots)
        for own in slots:
            for slot in own:
                slot.put(None)
        return slots

    def _placed(self, sizes: Sequence[int]) -> StreamPlan:
        self._plan = place_blocks(sizes, self._fixed, self._hardware)
        return self._plan

    def _report(self, supply: Supply, weight_bytes: int) -> StreamReport:
        plan, stored = self._plan, self._stored
        return StreamReport(
            blocks=plan.n_blocks,
            device_resident=plan.device_resident,
            host_resident=plan.host_resident,
            from_disk=plan.disk_blocks,
            format=None if self._quantised is None else self._quantised.format.name,
            weight_bytes=weight_bytes,
            streamed_bytes=sum(self._blocks),
            vram_limit_bytes=self._vram.cap_bytes,
            peak_vram_bytes=self._vram.peak,
            ram_limit_bytes=self._ram.cap_bytes,
            peak_ram_bytes=self._ram.peak,
            disk_bytes=self._source.pack_bytes + (stored.file_bytes if stored else 0),
            read_bytes=supply.read_bytes,
            copied_bytes=supply.copied_bytes,
            passes=supply.passes,
            skipped=supply.skipped,
        )


def held_bytes(module: nn.Module, hardware: Hardware) -> int:
    """Return what the module takes of a GPU now, and so is not free there."""
    device = torch.device(hardware.place)
    tensors = [*module.parameters(), *module.buffers()] if device.type == "cuda" else []
    return sum(tensor.nbytes for tensor in tensors if tensor.device == device)
