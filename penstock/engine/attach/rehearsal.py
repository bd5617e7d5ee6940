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
from dataclasses import dataclass, field, replace
from functools import cache, partial
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
from torch.utils.flop_counter import flop_registry

from penstock.engine.attach.repeats import Record, Repeats
from penstock.errors import UsageError
from penstock.units import MIB

TRUE_BYTES = 16 * MIB
"""What is computed for true takes no more; pipelines decide by masks and ids, which are smaller."""


_SHOWN_CHARS = 160
"""Of what torch says."""


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
        tiled: the networks whose own tiling was switched on.
        flops: of each network the operations (two a multiplication) of its "product"s, its
            "attention" and its "convolution"s.
    """

    visits: tuple[Visit, ...]
    uses: Mapping[str, Mapping[str, int]]
    peak_bytes: int
    tiled: tuple[str, ...] = ()
    flops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def calls_of(self, component: str) -> int:
        """Return how often ``component`` was called: as often as most of its weights were used."""
        return min(multimode(self.uses.get(component, {}).values()), default=0)

    def peak_of(self, component: str) -> int:
        """Return the most that lives while ``component`` works; 0: it never does."""
        return max((v.peak_bytes for v in self.visits if v.component == component), default=0)


def rehearse(
    networks: Mapping[str, nn.Module],
    call: Callable[[], Any],
    device: str = "cpu",
    limit: int | None = None,
) -> Rehearsed:
    """Make ``call``, the weights of ``networks`` without values, and see what it takes.

    The networks may be on the meta device, or hold their weights; they are as before afterwards,
    but for the tiling that ``limit`` asked for.
    What ``call`` returns is dropped. Torch's random state is left as it was.

    Args:
        networks: by name: all whose weights the call uses.
        call: computes with them; tensors that it is given are true ones.
        device: that the weights seem to be on.
        limit: bytes beside weights above which a network that can decode or encode in tiles does
            so from then on; None: as the networks are.

    Raises:
        UsageError: the call decides by values that come from weights; names where.
    """
    stage = _Stage(device)
    repeats, tiling = Repeats(stage, networks), _Tiling(stage, networks, limit)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), stage.dressed(networks), stage:
        try:
            with repeats.watched(), tiling.watched(), _masks_at_once(networks):
                call()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _undecidable(f"{error.func} wants values") from error
        except UnsupportedOperatorException as error:
            raise _undecidable(f"{error.func} has no form for shapes alone") from error
        except NotImplementedError as error:  # of operators on functions, as flex attention is
            raise _undecidable(f"{error}".partition("Hint:")[0][:_SHOWN_CHARS]) from error
    return replace(stage.rehearsed(), tiled=tuple(tiling.switched))


def _undecidable(found: str) -> UsageError:
    return UsageError(
        "what this model's call takes cannot be measured without its weights",
        expected="one whose way does not depend on what its networks compute",
        found=found,
        remedy="Say how much it takes beside weights: activations=... or --activations.",
    )


def _causal_mask(
    n_frame: int, n_hw: int, dtype: Any, device: Any, batch_size: int | None = None
) -> Tensor:
    """Return the mask in the shape that `HunyuanVideo15AttnBlock.prepare_causal_attention_mask`
    gives it."""
    mask = torch.empty(n_frame * n_hw, n_frame * n_hw, dtype=dtype, device=device)
    return mask if batch_size is None else mask.unsqueeze(0).expand(batch_size, -1, -1)


@contextmanager
def _masks_at_once(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """HunyuanVideo 1.5's VAE fills its mask in a loop of Python, a row of up to 10^5 a turn: a
    minute of operations of which none changes a shape. Inside, the mask is made without."""
    name = "prepare_causal_attention_mask"
    blocks = [
        module
        for network in networks.values()
        for module in network.modules()
        if type(module).__name__ == "HunyuanVideo15AttnBlock" and name not in vars(module)
    ]
    # fmt: skip
    for block in blocks:
        setattr(block, name, _causal_mask)
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, name)


class _OverLimitError(Exception):
    """Whole frames do not fit: there is no need to know by how much."""


class _Tiling:
    """Lets networks that can work in tiles do so, once they go over a limit."""

    def __init__(self, stage: _Stage, networks: Mapping[str, nn.Module], limit: int | None) -> None:
        self.switched: list[str] = []
        self._stage = stage
        self._limit = limit
        self._able = {
            name: network for name, network in networks.items()
            if limit is not None and hasattr(network, "enable_tiling")
            and not getattr(network, "use_tiling", False)
        }  # fmt: skip

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch calls of ``encode`` and ``decode`` inside."""
        changed = []
        try:
            for name, network in self._able.items():
                for method in ("encode", "decode"):
                    whole = getattr(network, method, None)
                    if whole is not None and method not in vars(network):
                        setattr(network, method, partial(self._called, name, network, whole))
                        changed.append((network, method))
            yield
        finally:
            for network, method in changed:
                delattr(network, method)

    def _called(self, name: str, network: Any, whole: Any, *args: Any, **kwargs: Any) -> Any:
        if name in self.switched:
            return whole(*args, **kwargs)
        try:
            with self._stage.limited(self._limit):
                return whole(*args, **kwargs)
        except _OverLimitError:
            self.switched.append(name)
        network.enable_tiling()
        return whole(*args, **kwargs)


class _Stage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fake where weights are concerned, true where not; counts living storages."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: dict[int, tuple[str, str]] = {}
        self._known: set[int] = set()
        self._excluded: list[Any] = []
        self.live_bytes = self._peak = 0
        self._records: list[Record] = []
        self._limit: int | None = None
        self._visits: list[Visit] = []
        self._uses: dict[str, Counter[str]] = {}
        self._flops: dict[str, Counter[str]] = {}

    def rehearsed(self) -> Rehearsed:
        """Return what was seen."""
        uses = {name: dict(own) for name, own in self._uses.items()}
        flops = {name: dict(own) for name, own in self._flops.items()}
        return Rehearsed(tuple(self._visits), uses, self._peak, flops=flops)

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
        if not _BY_VALUES.isdisjoint(func.tags):
            for record in self._records:
                record.by_values = True
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in given:
            if id(leaf) in self._weights:
                self.use(*self._weights[id(leaf)])
        out = self._run(func, args, kwargs, any(isinstance(leaf, FakeTensor) for leaf in given))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        kind = _COMPUTES.get(func.overloadpacket)
        if kind is not None:
            self.compute(kind, _FLOPS[func.overloadpacket](*args, **kwargs, out_val=out))
        return out

    def compute(self, kind: str, flops: int) -> None:
        """Count operations of the network that is at work."""
        for record in self._records:
            record.flops[kind] += flops
        if self._visits:
            self._flops.setdefault(self._visits[-1].component, Counter())[kind] += flops

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fake: bool) -> Any:
        if not fake and self._makes_little(func, args, kwargs):
            return func(*args, **kwargs)
        if _writes_first(func):
            # What was written to is what comes back, be it a true tensor: its values are old then.
            return args[0]
        return self._faked(func, args, kwargs)

    def _faked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _INDEXED:
            args = (args[0], [n for each in args[1] for n in _positions(each)], *args[2:])
        with self._fake:
            return func(*args, **kwargs | ({"generator": None} if "generator" in kwargs else {}))

    def _makes_little(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether an operation on true tensors may be computed for true."""
        if torch.Tag.inplace_view in func.tags:
            return True
        try:
            out = self._faked(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # no more than its inputs, which are true already
        made = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        return sum(leaf.untyped_storage().nbytes() for leaf in made) <= TRUE_BYTES

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """See what happens inside."""
        record = Record(self.live_bytes, self.live_bytes)
        self._records.append(record)
        try:
            yield record
        finally:
            self._records.pop()

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """Give up inside as soon as more than ``nbytes`` live, as if nothing had happened."""
        uses, flops = (
            {name: Counter(own) for name, own in counted.items()}
            for counted in (self._uses, self._flops)
        )
        before = self._peak, list(self._visits), uses, flops
        self._limit = nbytes
        try:
            yield
        except _OverLimitError:
            self._peak, self._visits, self._uses, self._flops = before
            raise
        finally:
            self._limit = None

    def fake(self, nbytes: int, device: torch.device) -> Tensor:
        """Return new memory without values, counted: bytes, one dimension."""
        with self._fake:
            made = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._count(made.untyped_storage())
        return made

    def use(self, component: str, name: str) -> None:
        """Count one use of a weight."""
        for record in self._records:
            record.uses.append((component, name))
        self._uses.setdefault(component, Counter())[name] += 1
        if not self._visits or self._visits[-1].component != component:
            self._visits.append(Visit(component, self.live_bytes))

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
        self.live_bytes += size
        weakref.finalize(storage, self._forget, key, size)
        self.reach(0)

    def reach(self, nbytes: int) -> None:
        """Count that so much lived beside what lives now; bytes."""
        lives = self.live_bytes + nbytes
        if self._limit is not None and lives > self._limit:
            raise _OverLimitError
        self._peak = max(self._peak, lives)
        for record in self._records:
            record.peak_bytes = max(record.peak_bytes, lives)
        if self._visits and lives > self._visits[-1].peak_bytes:
            self._visits[-1] = Visit(self._visits[-1].component, lives)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count both products; each given as (batch, heads, tokens, width)."""
    batch, heads, tokens, width = query.shape
    return int(2 * batch * heads * tokens * key.shape[-2] * (width + value.shape[-1]))


_aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry, _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}  # fmt: skip
"""torch's own counts, and of its attention on the CPU, which is not among them."""

_COMPUTES: dict[Any, str] = {
    **dict.fromkeys((_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm), "product"),
    **dict.fromkeys((_aten.convolution, _aten._convolution), "convolution"),
    **dict.fromkeys(
        (
            _aten._scaled_dot_product_flash_attention_for_cpu,
            _aten._scaled_dot_product_efficient_attention,
            _aten._scaled_dot_product_flash_attention,
            _aten._scaled_dot_product_cudnn_attention,
        ),
        "attention",
    ),
}


@cache
def _writes_first(func: Any) -> bool:
    """Return whether an operation does nothing but change its first argument's values."""
    first, results = func._schema.arguments[:1], func._schema.returns
    if torch.Tag.inplace_view in func.tags or "resize" in func._schema.name:
        return False
    return len(first) == len(results) == 1 and all(
        each.alias_info is not None and each.alias_info.is_write for each in (*first, *results)
    )


_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def _positions(index: Any) -> tuple[Any, ...]:
    """Return a true mask as the positions that it picks: their number is known then."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True) if index.dtype == torch.bool else (index,)
