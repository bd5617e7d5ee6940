"""A list of blocks whose weights are onloaded: there while a block is current, away else."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.endless import EndlessStream
from penstock.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """A place in a block that a streamed tensor is put into.

    Attributes:
        owner, leaf: the sub-module and its name for the tensor.
        name: of the tensor in the block.
        away: what stands there otherwise.
        original: what was there before the module was streamed.
    """

    owner: nn.Module
    leaf: str
    name: str
    away: AwayWeight
    original: Tensor

    def put(self, tensor: Tensor | None) -> None:
        """The tensor, or what stands for it (None)."""
        if self.leaf in self.owner._parameters:
            kept: Any = self.away
            if tensor is not None:
                kept = nn.Parameter(tensor, requires_grad=False)
            self.owner._parameters[self.leaf] = kept
        else:
            self.owner._buffers[self.leaf] = self.away if tensor is None else tensor

    def restore(self) -> None:
        """What was there before."""
        place: Any = self.owner._parameters
        (place if self.leaf in place else self.owner._buffers)[self.leaf] = self.original


class Onloader:
    """Brings blocks in any order from a stream that brings them in one.

    Args:
        blocks: the modules.
        slots: of each.
        stream: open.

    Attributes:
        passes: how often the stream has gone over all blocks, begun ones included.
        skipped: blocks that went by because another one was wanted.
        owner: kept alive as long as the blocks can be reached.
    """

    owner: object = None

    def __init__(
        self, blocks: Sequence[nn.Module], slots: Sequence[Sequence[Slot]], stream: EndlessStream
    ) -> None:
        self._blocks, self._slots, self._stream = blocks, slots, stream
        self._pass: Iterator[tuple[int, Mapping[str, Tensor]]] | None = None
        self._onloaded: int | None = None
        self._walk: object | None = None
        self._thread = 0
        self.passes = self.skipped = 0

    def onload(self, index: int) -> nn.Module:
        """The block with its weights in place; the one brought in before is taken back.

        Raises:
            UsageError: gradients are recorded, or another thread is in the middle of a pass.
            CheckpointChanged, CheckpointError: the weights cannot be read.
        """
        self._check()
        if index != self._onloaded:
            self.take_back()
            for slot, tensor in self._tensors(index):
                slot.put(tensor)
            self._onloaded = index
        return self._blocks[index]

    def walk(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """Lend several, each until the next."""
        self._check()
        mark = self._walk = object()
        self._thread = threading.get_ident()
        try:
            for index in indices:
                yield self.onload(index)
        finally:
            if self._walk is mark:  # no other pass has begun since this one was left
                self._walk = None
                self.take_back()

    def take_back(self) -> None:
        """No block has weights after this."""
        index, self._onloaded = self._onloaded, None
        if index is None:
            return
        for slot in self._slots[index]:
            slot.put(None)
        if index == len(self._blocks) - 1 and self._pass is not None:
            # Tells the stream that the pass is over, so that it reads ahead for the next.
            next(self._pass, None)
            self._pass = None

    def _tensors(self, index: int) -> Iterator[tuple[Slot, Tensor]]:
        while True:
            if self._pass is None:
                self._pass = self._stream.forward_pass()
                self.passes += 1
            found = next(self._pass, None)
            if found is None:
                self._pass = None
            elif found[0] == index:
                return ((slot, found[1][slot.name]) for slot in self._slots[index])
            else:
                self.skipped += 1

    def _check(self) -> None:
        if torch.is_grad_enabled():
            raise UsageError(
                "streamed blocks cannot be trained: their weights are there for a moment only",
                expected="a forward pass under torch.no_grad() or torch.inference_mode()",
                found="one that records gradients",
            )
        if self._walk is not None and self._thread != threading.get_ident():
            raise UsageError(
                "a streamed module serves one thread at a time",
                expected="the pass of the other thread to end first",
                found="two at once",
                remedy="Hold a lock around the module, or stream a second one",
            )


class StreamedBlocks(nn.ModuleList):
    """Stands in the place of a module's list of blocks.

    A block is there from when it is taken from the list (by iteration or by index, in any order)
    until another one is taken, or the iteration ends. In the order of the list each is read ahead
    of its use; another order is served by letting the blocks between go by.

    Args:
        blocks: all that are streamed.
        lender: of them.
        part: those of this list.
    """

    def __init__(self, blocks: Sequence[nn.Module], onloader: Onloader, part: range) -> None:
        super().__init__()
        self._onloader, self._part = onloader, part
        for index, place in enumerate(part):
            self.add_module(str(index), blocks[place])

    def __iter__(self) -> Iterator[nn.Module]:
        return self._onloader.walk(self._part)

    def __getitem__(self, index: Any) -> Any:
        """A block, or an iterable over some of them."""
        if isinstance(index, slice):
            return OnloadedSlice(self._onloader, self._part[index])
        return self._onloader.onload(self._part[index])

    def __contains__(self, module: object) -> bool:
        return any(module is block for block in self._modules.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks)"

    def _fixed(self, *_: object) -> NoReturn:
        raise UsageError(
            "the blocks of a streamed module cannot be changed",
            remedy="Close the stream, change them, and stream the module again.",
        )

    append = insert = extend = pop = _fixed  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __add__ = _fixed  # type: ignore[assignment]


class OnloadedSlice(Sequence[nn.Module]):
    """Some blocks of a streamed list."""

    def __init__(self, onloader: Onloader, indices: range) -> None:
        self._onloader, self._indices = onloader, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[nn.Module]:
        return self._onloader.walk(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """A block, or an iterable over some of them."""
        if isinstance(index, slice):
            return OnloadedSlice(self._onloader, self._indices[index])
        return self._onloader.onload(self._indices[index])
