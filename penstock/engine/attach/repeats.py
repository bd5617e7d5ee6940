"""Blocks that repeat: what one takes on shapes alone, its likes take too, so it is seen once.

A transformer is one kind of block many times over, and a rehearsal's time is the number of
operations. A block of a list that was seen at work is remembered by its structure and by the shapes
that it was given; where its like is called with the like, what comes out is made again from what is
remembered: fresh tensors of these shapes, the weights counted as used, the memory as reached.

Only what is a function of shapes is remembered. A block that looked at values, that kept a tensor
beyond its result (a cache of keys and values), was given an object of unknown kind, or returned a
true tensor or a view of what it was given, is run each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

_NUMBER = "layer_idx"
"""What transformers calls a layer's place in its list. It decides which cache is used, and with a
cache nothing is remembered."""


@dataclass
class Record:
    """What was seen while a block ran.

    Attributes:
        live_bytes: of all tensors when it began.
        peak_bytes: of all tensors at most since then.
        uses: component and name of each weight, in the order of use.
        flops: operations by kind.
        by_values: an operation's result, or its shape, depended on values.
    """

    live_bytes: int
    peak_bytes: int
    uses: list[tuple[str, str]] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    by_values: bool = False


class Stage(Protocol):
    """What a rehearsal offers meanwhile."""

    live_bytes: int

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """See what happens inside."""

    def use(self, component: str, name: str) -> None:
        """Count one use of a weight."""

    def reach(self, nbytes: int) -> None:
        """Count that so much lived beside what lives now; bytes."""

    def compute(self, kind: str, flops: int) -> None:
        """Count operations."""

    def fake(self, nbytes: int, device: torch.device) -> Tensor:
        """Return new memory without values, counted: bytes, one dimension."""


@dataclass(frozen=True)
class _Made:
    """A tensor with memory of its own."""

    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Seen:
    """What a block's call came to: leaves are new tensors, numbers of given ones, or plain."""

    over_bytes: int
    uses: tuple[tuple[str, str, bool], ...]
    flops: Mapping[str, int]
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass(frozen=True)
class _Given:
    """The leaf so-and-so of what the block was given, returned as it is."""

    number: int


class Repeats:
    """Remembers blocks while a rehearsal runs.

    Args:
        stage: counts.
        networks: by the names that uses are counted under.
    """

    def __init__(self, stage: Stage, networks: Mapping[str, nn.Module]) -> None:
        self._stage = stage
        self._networks = networks
        self._seen: dict[Any, _Seen | None] = {}
        self._known: list[Any] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remember the members of the networks' lists inside, and leave them as before
        afterwards."""
        changed = []
        try:
            for component, network in self._networks.items():
                for path, owner in network.named_modules():
                    if not isinstance(owner, nn.ModuleList):
                        continue
                    for number, block in enumerate(owner):
                        # A forward of its own is somebody's hook: it may do more than compute.
                        if "forward" not in vars(block) and not block._forward_hooks:
                            where = f"{path}.{number}.".lstrip(".")
                            block.forward = partial(self._called, component, where, block)
                            changed.append(block)
            yield
        finally:
            for block in changed:
                del block.forward

    def _called(self, component: str, where: str, block: nn.Module, *args: Any, **kw: Any) -> Any:
        run: Callable[[], Any] = partial(type(block).forward, block, *args, **kw)
        given, spec = tree_flatten((args, kw))
        key = self._key(block, given, spec)
        if key is None or self._seen.get(key, self) is None:
            return run()
        if key in self._seen:
            found = self._seen[key]
            assert found is not None
            return self._again(component, where, found, given)
        with self._stage.recorded() as record:
            out = run()
        self._seen[key] = self._understood(component, where, record, given, out)
        return out

    def _key(self, block: nn.Module, given: list[Any], spec: TreeSpec) -> Any:
        """Return a key of all that decides what the call takes; None: more than can be told."""
        told: list[Any] = [_structure(block), self._kept(spec)]
        memories: dict[int, int] = {}
        for leaf in given:
            if isinstance(leaf, Tensor):
                same = memories.setdefault(leaf.untyped_storage()._cdata, len(memories))
                told.append((isinstance(leaf, FakeTensor), same, *_shaped(leaf)))
            elif isinstance(leaf, _PLAIN):
                told.append((type(leaf), leaf))
            else:
                return None
        return tuple(told)

    def _kept(self, spec: TreeSpec) -> int:
        """Return the number of a structure of arguments."""
        if spec not in self._known:
            self._known.append(spec)
        return self._known.index(spec)

    def _understood(
        self, component: str, where: str, record: Record, given: list[Any], out: Any
    ) -> _Seen | None:
        returned, spec = tree_flatten(out)
        leaves: list[Any] = []
        for leaf in returned:
            number = next((n for n, each in enumerate(given) if each is leaf), None)
            if number is not None:
                leaves.append(_Given(number))
            elif isinstance(leaf, FakeTensor):
                leaves.append(_Made(leaf.untyped_storage().nbytes(), *_shaped(leaf)))
            elif isinstance(leaf, _PLAIN):
                leaves.append(leaf)
            else:
                return None
        stays = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, _Made))
        # As much must live as is returned: what else stays is kept somewhere, and what is not new
        # lies in memory of another's.
        if record.by_values or self._stage.live_bytes - record.live_bytes != stays:
            return None
        uses = tuple(
            (name.removeprefix(where), user, user == component and name.startswith(where))
            for user, name in record.uses
        )
        over = record.peak_bytes - record.live_bytes
        return _Seen(over, uses, record.flops, tuple(leaves), spec)

    def _again(self, component: str, where: str, seen: _Seen, given: list[Any]) -> Any:
        for name, user, own in seen.uses:
            self._stage.use(component if own else user, where + name if own else name)
        for kind, flops in seen.flops.items():
            self._stage.compute(kind, flops)
        self._stage.reach(seen.over_bytes)
        return tree_unflatten([self._leaf(leaf, given) for leaf in seen.leaves], seen.spec)

    def _leaf(self, leaf: Any, given: list[Any]) -> Any:
        if isinstance(leaf, _Given):
            return given[leaf.number]
        if not isinstance(leaf, _Made):
            return leaf
        memory = self._stage.fake(leaf.nbytes, leaf.device).view(leaf.dtype)
        return memory.as_strided(leaf.shape, leaf.stride, leaf.offset)


def _shaped(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype,
            tensor.device)  # fmt: skip


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Return what a block is but for its weights' values and its place in the list."""
    found: list[Any] = []
    for path, module in block.named_modules():
        settings = [(name, _told(value)) for name, value in sorted(vars(module).items())
                    if not name.startswith("_") and name not in (_NUMBER, "forward")]  # fmt: skip
        held = [(name, _shaped(each)) for place in (module._parameters, module._buffers)
                for name, each in place.items() if each is not None]  # fmt: skip
        found.append((path, type(module), tuple(settings), tuple(held)))
    return tuple(found)


def _told(value: Any) -> Any:
    """Return a setting, as far as it can be compared; an object of its own is its kind and
    settings."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_told(each) for each in value)
    if isinstance(value, (type, FunctionType, MethodType)) or not hasattr(value, "__dict__"):
        return id(value)
    own = {name: each for name, each in vars(value).items() if name != _NUMBER}
    plain = tuple(sorted((n, v) for n, v in own.items() if isinstance(v, (bool, int, str))))
    rest = tuple(sorted((n, id(v)) for n, v in own.items() if not isinstance(v, (bool, int, str))))
    return (type(value), plain, rest)
