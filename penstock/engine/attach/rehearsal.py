"""What a call computes, rehearsed on tensors that have shapes and no values: seconds, no memory.

A network that nobody wrote closed forms for still has to be planned. Its weights are replaced by
fake tensors (torch's `FakeTensorMode`: shape, type and device, no bytes) and the call is made. What
touches no weight and is small (token ids, masks, timesteps) is computed for true meanwhile, because
pipelines decide by it. What decides by values that come from weights cannot be rehearsed, and is
refused.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import multimode
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from penstock.errors import UsageError
from penstock.units import MIB

TRUE_BYTES = 16 * MIB
"""What is computed for true takes no more; pipelines decide by masks and ids, which are smaller."""


@dataclass(frozen=True)
class Visit:
    """One network at work, from the first use of its weights to another one's.

    Attributes:
        component: its name.
        peak_bytes: of all living tensors meanwhile, weights left out.
    """

    component: str
    peak_bytes: int


@dataclass(frozen=True)
class Rehearsed:
    """What a call takes beside weights; bytes.

    Attributes:
        visits: the networks in the order in which they work.
        uses: of each network the names of its tensors, in the order of their first use, and how
            often each was used.
        peak_bytes: of all living tensors at any time.
    """

    visits: tuple[Visit, ...]
    uses: Mapping[str, Mapping[str, int]]
    peak_bytes: int

    def calls_of(self, component: str) -> int:
        """How often ``component`` was called: as often as most of its weights were used."""
        return min(multimode(self.uses.get(component, {}).values()), default=0)

    def peak_of(self, component: str) -> int:
        """The most that lives while ``component`` works; 0: it never does."""
        return max((v.peak_bytes for v in self.visits if v.component == component), default=0)


def rehearse(
    networks: Mapping[str, nn.Module], call: Callable[[], Any], device: str = "cpu"
) -> Rehearsed:
    """Make ``call``, the weights of ``networks`` without values, and see what it takes.

    The networks may be on the meta device, or hold their weights; they are as before afterwards.
    What ``call`` returns is dropped. Torch's random state is left as it was.

    Args:
        networks: by name: all whose weights the call uses.
        call: computes with them; tensors that it is given are true ones.
        device: that the weights seem to be on.

    Raises:
        UsageError: the call decides by values that come from weights; names where.
    """
    stage = _Stage(device)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), stage.dressed(networks), stage:
        try:
            call()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _undecidable(f"{error.func} wants values") from error
        except UnsupportedOperatorException as error:
            raise _undecidable(f"{error.func} has no form for shapes alone") from error
    return stage.rehearsed()


def _undecidable(found: str) -> UsageError:
    return UsageError(
        "what this model's call takes cannot be measured without its weights",
        expected="one whose way does not depend on what its networks compute",
        found=found,
        remedy="Say how much it takes beside weights: activations=... or --activations.",
    )


class _Stage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fake where weights are concerned, true where not; counts living storages."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: dict[int, tuple[str, str]] = {}
        self._known: set[int] = set()
        self._excluded: list[Any] = []
        self._live = self._peak = 0
        self._visits: list[Visit] = []
        self._uses: dict[str, Counter[str]] = {}

    def rehearsed(self) -> Rehearsed:
        """What was seen."""
        uses = {name: dict(own) for name, own in self._uses.items()}
        return Rehearsed(tuple(self._visits), uses, self._peak)

    @contextmanager
    def dressed(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Weights, and buffers without values, are fake inside."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        made: dict[int, Tensor] = {}
        try:
            for component, network in networks.items():
                for path, owner in network.named_modules():
                    for place in (owner._parameters, owner._buffers):
                        for leaf, tensor in place.items():
                            if tensor is None or (place is owner._buffers and not tensor.is_meta):
                                continue
                            if id(tensor) not in made:
                                made[id(tensor)] = self._dress(tensor)
                                name = f"{path}.{leaf}".lstrip(".")
                                self._weights[id(made[id(tensor)])] = (component, name)
                            undo.append((place, leaf, tensor))
                            place[leaf] = made[id(tensor)]  # type: ignore[assignment]
                for buffer in network.buffers():
                    self._exclude(buffer)
            yield
        finally:
            for place, leaf, tensor in undo:
                place[leaf] = tensor

    def _dress(self, tensor: Tensor) -> Tensor:
        with self._fake:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
            )
            dressed = nn.Parameter(fake, requires_grad=False)
        self._exclude(dressed)
        return dressed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in given:
            if id(leaf) in self._weights:
                self._use(*self._weights[id(leaf)])
        out = self._run(func, args, kwargs, any(isinstance(leaf, FakeTensor) for leaf in given))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fake: bool) -> Any:
        if not fake and self._makes_little(func, args, kwargs):
            return func(*args, **kwargs)
        out = self._faked(func, args, kwargs)
        # What was written to is what comes back, be it a true tensor: its values are old then.
        writes = func._schema.is_mutable and isinstance(out, Tensor)
        return args[0] if writes and isinstance(args[0], Tensor) else out

    def _faked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _INDEXED:
            args = (args[0], [n for each in args[1] for n in _positions(each)], *args[2:])
        with self._fake:
            return func(*args, **kwargs | ({"generator": None} if "generator" in kwargs else {}))

    def _makes_little(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on true tensors may be computed for true."""
        if torch.Tag.inplace_view in func.tags:
            return True
        try:
            out = self._faked(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # no more than its inputs, which are true already
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        return sum(leaf.untyped_storage().nbytes() for leaf in made) <= TRUE_BYTES

    def _use(self, component: str, name: str) -> None:
        self._uses.setdefault(component, Counter())[name] += 1
        if not self._visits or self._visits[-1].component != component:
            self._visits.append(Visit(component, self._live))

    def _exclude(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._excluded.append(storage)
        self._known.add(storage._cdata)

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._live += size
        weakref.finalize(storage, self._forget, key, size)
        self._peak = max(self._peak, self._live)
        if self._visits and self._live > self._visits[-1].peak_bytes:
            last = self._visits[-1]
            self._visits[-1] = Visit(last.component, self._live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def _positions(index: Any) -> tuple[Any, ...]:
    """A true mask as the positions that it picks: their number is known then."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True) if index.dtype == torch.bool else (index,)
