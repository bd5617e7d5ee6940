"""Weights that are onloaded as they are used: there while their block is current, away else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.supply import Supply
from penstock.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """A place in a module that a streamed tensor is put into.

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

    def put(self, tensor: Tensor | None) -> Tensor:
        """Return the tensor, or what stands for it (None); gives what is there now."""
        # `.data` counts its own changes; a view's are those of the whole buffer.
        kept: Any = self.away if tensor is None else tensor.data
        if self.leaf in self.owner._parameters:
            if tensor is not None:
                kept = nn.Parameter(kept, requires_grad=False)
            self.owner._parameters[self.leaf] = kept
        else:
            self.owner._buffers[self.leaf] = kept
        made: Tensor = kept
        return made

    def restore(self) -> None:
        """Put back what was there before."""
        place: Any = self.owner._parameters
        (place if self.leaf in place else self.owner._buffers)[self.leaf] = self.original


class Lending(dict[str, Any]):
    """The parameters or buffers of a module, of which those that are away come when asked for.

    `nn.Module` looks a weight up here when its forward uses it. What goes through all of them
    (``named_parameters``, ``state_dict``) sees what stands for those that are away; so does who
    asks while gradients are recorded, which is no error before something is computed.

    Args:
        tensors: by name.
        fetch: brings what is called so.
    """

    def __init__(self, tensors: Mapping[str, Any], fetch: Mapping[str, Callable[[], None]]) -> None:
        super().__init__(tensors)
        self._fetch = dict(fetch)

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if type(found) is not AwayWeight or torch.is_grad_enabled():
            return found
        self._fetch[name]()
        return super().__getitem__(name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always: half of a module would be copied.
        """
        raise UsageError(
            "a module that is being streamed cannot be copied or pickled",
            remedy="Close the stream first.",
        )


def lend(slots: Iterable[tuple[Slot, Callable[[], None]]]) -> Callable[[], None]:
    """Make the owners of ``slots`` ask for what is away; gives what undoes it."""
    owners: dict[int, nn.Module] = {}
    wanted: dict[int, dict[str, Callable[[], None]]] = {}
    for slot, fetch in slots:
        owners[id(slot.owner)] = slot.owner
        wanted.setdefault(id(slot.owner), {})[slot.leaf] = fetch
    for key, owner in owners.items():
        for place in ("_parameters", "_buffers"):
            tensors = vars(owner)[place]
            names = {leaf: fetch for leaf, fetch in wanted[key].items() if leaf in tensors}
            if names:
                vars(owner)[place] = Lending(tensors, names)

    def undo() -> None:
        for owner in owners.values():
            for place in ("_parameters", "_buffers"):
                vars(owner)[place] = dict(vars(owner)[place])

    return undo


class Loan:
    """What was put into some slots, and whether it is still as it was put there."""

    def __init__(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> None:
        self._slots = slots
        put = [slot.put(tensors[slot.name]) for slot in slots]
        self._marks = [_mark(tensor) for tensor in put]
        self._put = put

    def check(self) -> None:
        """Refuse to lose what was written.

        Raises:
            UsageError: a weight was changed; names it.
        """
        for slot, tensor, mark in zip(self._slots, self._put, self._marks, strict=True):
            if _mark(tensor) != mark:
                raise UsageError(
                    f"{slot.name} was written to while it is streamed, and would be lost",
                    expected="weights that are only read",
                    found="an in-place change, as by fusing a LoRA or loading weights",
                    remedy="Change weights before the module is streamed or attached.",
                )

    def end(self, *, checked: bool = False) -> None:
        """Everything is away again.

        Raises:
            UsageError: (``checked``) a weight was written to.
        """
        if checked:
            self.check()
        for slot in self._slots:
            slot.put(None)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return a number that changes when values are written, or other memory is put in place."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


class Onloader:
    """Puts the weights of a block in place when one of them is used, and takes them back when one
    of another block is.

    Args:
        slots: of each block.
        supply: brings their tensors.

    Attributes:
        owner: kept alive as long as the blocks can be reached.
    """

    owner: object = None

    def __init__(self, slots: Sequence[Sequence[Slot]], supply: Supply) -> None:
        self._slots, self._supply = slots, supply
        self._onloaded: int | None = None
        self._loan: Loan | None = None
        self._users = Users()

    def onload(self, index: int) -> None:
        """Put a block's weights in place.

        Raises:
            UsageError: another thread is in the middle of a call, or the weights of the block
                before were written to.
            CheckpointChanged, CheckpointError: the weights cannot be read.
        """
        self._users.check()
        loan, self._loan, self._onloaded = self._loan, None, None
        if loan is not None:
            loan.end(checked=True)
        tensors = self._supply.bring(index)
        self._loan = Loan(self._slots[index], tensors)
        self._onloaded = index

    def take_back(self) -> None:
        """No block has weights after this."""
        loan, self._loan, self._onloaded = self._loan, None, None
        if loan is not None:
            loan.end()
        self._supply.leave()

    def fetches(self) -> Iterable[tuple[Slot, Callable[[], None]]]:
        """Yield every slot, with what brings it."""
        for index, slots in enumerate(self._slots):
            for slot in slots:
                yield slot, lambda index=index: self.onload(index)  # type: ignore[misc]

    def watch(self, module: nn.Module) -> Callable[[], None]:
        """Know when ``module`` is called and when a call ends; gives what undoes it."""
        begins = module.register_forward_pre_hook(lambda *_: self._users.begin())
        ends = module.register_forward_hook(lambda *_: self._end_call(), always_call=True)

        def undo() -> None:
            begins.remove()
            ends.remove()

        return undo

    def _end_call(self) -> None:
        """After the last block of a pass the next pass may be read ahead. Another one stays: a
        step cache of the user's may want it again."""
        ended = self._users.end()
        if ended and self._onloaded is not None and self._supply.is_last(self._onloaded):
            self.take_back()


class Users:
    """Which thread is in the middle of a call, and how deep."""

    def __init__(self) -> None:
        self._thread = self._depth = 0

    def begin(self) -> None:
        """Begin a call.

        Raises:
            UsageError: another thread is in the middle of one.
        """
        self.check()
        self._thread = threading.get_ident()
        self._depth += 1

    def end(self) -> bool:
        """End a call; return False for one that was refused: it has never begun."""
        begun = self._depth > 0 and self._thread == threading.get_ident()
        self._depth -= begun
        return begun

    def check(self) -> None:
        """Refuse a second thread.

        Raises:
            UsageError: another thread is in the middle of a call.
        """
        if self._depth and self._thread != threading.get_ident():
            raise UsageError(
                "a streamed module serves one thread at a time",
                expected="the call of the other thread to end first",
                found="two at once",
                remedy="Hold a lock around the module, or stream a second one",
            )


class StreamedBlocks(nn.ModuleList):
    """Stands in the place of a module's list of blocks: the same blocks, which cannot be changed.

    Args:
        blocks: of the list.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)

    def __getitem__(self, index: Any) -> Any:
        """Return a block, or a list of some of them."""
        blocks = list(self._modules.values())
        return nn.ModuleList(blocks[index]) if isinstance(index, slice) else blocks[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} blocks)"

    def _fixed(self, *_: object) -> NoReturn:
        raise UsageError(
            "the blocks of a streamed module cannot be changed",
            remedy="Close the stream, change them, and stream the module again.",
        )

    append = insert = extend = pop = _fixed  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __add__ = _fixed  # type: ignore[assignment]
