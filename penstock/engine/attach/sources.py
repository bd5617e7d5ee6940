"""Where the weights of a streamed module come from: its own memory, or files.

A module's own weights are written to a pack first, and come back from it in the end. Weights that
are in files already are streamed from these: nothing is written, and of the module only what lies
outside the blocks is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from penstock.blocks import PAGE_BYTES
from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.blocks import Slot
from penstock.engine.attach.fileweights import FileWeights, check_away
from penstock.engine.attach.livepack import LivePack, plan_live
from penstock.engine.attach.surgery import Emptied, Patient, run_name, specs_of
from penstock.engine.packs.file import PackLayout
from penstock.engine.packs.layout import Spec
from penstock.offload.layout import BlockLayout
from penstock.units import align_up


class Source(Protocol):
    """What `penstock.stream` needs of either kind.

    Attributes:
        specs: dtype tag and shape of every tensor of the blocks, by run and name.
        block_bytes: what each block takes in a buffer, unquantised.
        staying_bytes: of what stays on the device: weights outside the blocks, and buffers.
        pack_bytes: of what is written to disk.
    """

    specs: Mapping[str, Mapping[str, Spec]]
    block_bytes: list[int]
    staying_bytes: int
    pack_bytes: int

    def open(self, stack: ExitStack, place: Path) -> None:
        """Write what must be written to the folder ``place``."""

    def value(self, weight: Tensor) -> Tensor:
        """Return a weight of the blocks, with its values."""

    def layouts(self) -> list[BlockLayout]:
        """Return the layouts of the blocks, as they are streamed unquantised."""

    def empty(self, stack: ExitStack) -> None:
        """Let the blocks' weights go; ``stack`` brings them back."""

    def settle(self, device: torch.device, stack: ExitStack) -> None:
        """Bring what stays to the device; ``stack`` puts it back."""


class Held:
    """Weights in memory: they go to a pack, and come back from it.

    Args:
        patient: the module taken apart.

    Raises:
        UsageError: a weight that cannot be streamed.
    """

    def __init__(self, patient: Patient) -> None:
        self._patient, self._runs = patient, patient.runs()
        self.specs: Mapping[str, Mapping[str, Spec]] = specs_of(self._runs)
        self._layout = plan_live(self.specs)
        self.block_bytes = run_bytes(self._layout)
        self.pack_bytes = self._layout.file_bytes
        self.staying_bytes = storage_bytes(patient.staying)

    def open(self, stack: ExitStack, place: Path) -> None:
        """Write the pack.

        Raises:
            StorageError: no disk space.
        """
        self._pack = LivePack(place / "plain.safetensors", self._layout, self._values)
        stack.callback(self._pack.close)

    def value(self, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight

    def layouts(self) -> list[BlockLayout]:
        """Return the layouts of the blocks in the pack."""
        return layouts_of(self._pack, len(self._runs))

    def empty(self, stack: ExitStack) -> None:
        """Let the weights go; they come back into the same parameters."""
        stack.callback(Emptied(self._pack, self._runs).fill)

    def settle(self, device: torch.device, stack: ExitStack) -> None:
        """Move what stays; what is written to it meanwhile is kept."""
        move(self._patient.staying, device, stack)

    def _values(self, run: str) -> Iterator[Tensor]:
        yield from self._runs[run].values()


class Filed:
    """Weights in files, of a module that is on the meta device.

    The module's weights have the files' types meanwhile, as ``load_state_dict(assign=True)`` gives
    them.

    Args:
        patient: the module taken apart.
        module: itself.
        path: a ``.safetensors`` file, an index, or a folder with either.
        stack: closes the files and gives the module its own types back.

    Raises:
        UsageError: weights that are in memory, or buffers without values that no file holds.
        CheckpointError: no such files, or weights that they lack.
        TensorMismatch: another shape, or a type that the module does not compute in.
    """

    def __init__(self, patient: Patient, module: nn.Module, path: Path, stack: ExitStack) -> None:
        self._files = files = FileWeights(module, path, stack)
        self._runs = patient.runs()
        for own in self._runs.values():
            check_away(own)
        self.specs: Mapping[str, Mapping[str, Spec]] = {
            run: {name: files.spec(p) for name, p in own.items()} for run, own in self._runs.items()
        }
        self.block_bytes = [layout.nbytes for layout in self.layouts()]
        self._read = {id(t): t for t in patient.staying if id(t) in files.entries}
        self._here = [t for t in patient.staying if id(t) not in files.entries]
        read_bytes = sum(files.entries[key].nbytes for key in self._read)
        self.staying_bytes = read_bytes + storage_bytes(self._here)
        self.pack_bytes = 0

    def open(self, stack: ExitStack, place: Path) -> None:
        """Nothing is written."""

    def value(self, weight: Tensor) -> Tensor:
        """Return the weight, read now.

        Raises:
            CheckpointChanged: the file was truncated or touched.
        """
        return self._files.value(weight)

    def layouts(self) -> list[BlockLayout]:
        """Return the layouts of the blocks, where their files hold them."""
        return [
            BlockLayout.from_entries({name: self._files.entries[id(p)] for name, p in own.items()})
            for own in self._runs.values()
        ]

    def empty(self, stack: ExitStack) -> None:
        """Nothing is in memory."""

    def settle(self, device: torch.device, stack: ExitStack) -> None:
        """Read what stays; it is let go in the end."""
        move(self._here, device, stack)
        for key, weight in self._read.items():
            tensor = self.value(weight).to(device)
            for owner, leaf in self._files.places[key]:
                away = AwayWeight(weight, device, leaf)
                slot = Slot(owner, leaf, leaf, away, weight)
                stack.callback(slot.restore)
                slot.put(tensor)


def run_bytes(layout: PackLayout) -> list[int]:
    """Return what each run takes in a buffer."""
    return [align_up(run.nbytes, PAGE_BYTES) for run in layout.runs]


def layouts_of(pack: LivePack, blocks: int) -> list[BlockLayout]:
    """Return the layouts of the blocks that ``pack`` holds."""
    return [BlockLayout.from_entries(pack.entries(run_name(n))) for n in range(blocks)]


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Count the bytes of the memory that they lie in, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


def move(tensors: Sequence[Tensor], device: torch.device, stack: ExitStack) -> None:
    """Move them to the device, and back with the stack; what is written to them meanwhile is
    kept."""
    for tensor in tensors:
        home = tensor.device
        if home != device:
            tensor.data = tensor.data.to(device)
            stack.callback(_set_device, tensor, home)


def _set_device(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)
