"""A module's lists of blocks taken apart for streaming, and put together again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.blocks import Slot, StreamedBlocks
from penstock.engine.attach.livepack import LivePack, spec_of
from penstock.engine.attach.units import find_units
from penstock.engine.packs.layout import Spec
from penstock.errors import CheckpointError, UsageError
from penstock.formats.formats import QuantFormat
from penstock.formats.rows import Shape
from penstock.quant.arithmetic import quantise
from penstock.quant.compute import strategy_for
from penstock.quant.linear import QuantLinear
from penstock.quant.paths import Computing, scratch_bytes
from penstock.quant.values.tensors import dtype_tag


@dataclass(frozen=True)
class FoundLinear:
    """A linear layer to be stored quantised: its place in a block, and what it is."""

    name: str
    parent: nn.Module
    leaf: str
    module: nn.Linear

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        return self.module.out_features, self.module.in_features


class Patient:
    """A module, its blocks, and which of their weights can leave.

    A weight that is also used outside the blocks stays.

    Args:
        module: the whole module.
        paths: dotted names of the lists of blocks; None: they are found (`find_units`), and there
            may be none.

    Attributes:
        blocks: the modules of all lists.
        lists: how many these are.
        weights: of each block, the parameters that can leave, by local name, each once.
        outside: all other parameters.
        buffers: all of them; they stay.

    Raises:
        UsageError: there is no such list, or it holds nothing that can be streamed; names the
            lists that there are.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str] | None) -> None:
        check_unstreamed(module)
        lists = [] if paths is None else [_find(module, path) for path in paths]
        self.module = module
        self._places = [_places(module, each) for each in lists]
        self._originals = lists
        if paths is None:
            units = find_units(module)
            self.blocks = [unit.module for unit in units]
            self.lists = len({unit.list_name for unit in units})
        else:
            self.blocks = [block for each in lists for block in each]
            self.lists = len(lists)
        outside = {id(p) for p in _outside(module, self.blocks)}
        self.weights = [
            {name: p for name, p in block.named_parameters() if id(p) not in outside}
            for block in self.blocks
        ]
        if paths is None:
            whole = [n for n, own in enumerate(self.weights) if own]
            self.blocks = [self.blocks[n] for n in whole]
            self.weights = [self.weights[n] for n in whole]
        elif not any(self.weights):
            raise UsageError(
                f"{', '.join(paths)}: no weights of its own to stream",
                expected="blocks with parameters that are not used elsewhere",
                found=f"{len(self.blocks)} blocks",
            )
        leaving = {id(p) for own in self.weights for p in own.values()}
        self.outside = [p for p in module.parameters() if id(p) not in leaving]
        self.buffers = list(module.buffers())

    @property
    def staying(self) -> list[Tensor]:
        """What is not in a block."""
        return [*self.outside, *self.buffers]

    @property
    def weight_bytes(self) -> int:
        """Of all weights that can leave, each counted once."""
        return sum({id(p): p.nbytes for own in self.weights for p in own.values()}.values())

    def runs(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the weights that can leave, by run and name in a pack."""
        return {
            run_name(index): {stored(index, name): p for name, p in own.items()}
            for index, own in enumerate(self.weights)
        }

    def linears(self, fmt: QuantFormat, keep: Collection[str]) -> list[list[FoundLinear]]:
        """Return the linear layers of each block that ``fmt`` can store; weights used twice stay
        plain.

        Args:
            keep: ends of names of layers that stay as they are.
        """
        ends = tuple(f".{end}" for end in keep)
        return [
            [
                each
                for each in _linears(block, {id(p) for p in own.values()})
                if fmt.fits(each.shape) and not f".{each.name}".endswith(ends)
            ]
            for block, own in zip(self.blocks, self.weights, strict=True)
        ]

    def slots(self, index: int, device: torch.device) -> list[Slot]:
        """Return where the weights of a block go, each under the name it is stored by."""
        names = {id(p): stored(index, name) for name, p in self.weights[index].items()}
        return [
            Slot(owner, leaf, names[id(p)], AwayWeight(p, device, names[id(p)]), p)
            for owner in self.blocks[index].modules()
            for leaf, p in owner._parameters.items()
            if p is not None and id(p) in names
        ]

    def fix_lists(self, stack: ExitStack) -> None:
        """Put lists that cannot be changed in the places of those that were named."""
        for places, own in zip(self._places, self._originals, strict=True):
            put = StreamedBlocks(own)
            for parent, name in places:
                parent._modules[name] = put
                stack.callback(parent._modules.__setitem__, name, own)


def specs_of(runs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Spec]]:
    """Return the dtype tag and shape of every tensor of ``runs``, as a pack states them.

    Raises:
        UsageError: one that cannot be streamed.
    """
    return {
        run: {name: spec_of(tensor, name) for name, tensor in own.items()}
        for run, own in runs.items()
    }


def run_name(index: int) -> str:
    """Return the run that holds a block."""
    return f"block {index}"


def _index(run: str) -> int:
    return int(run.partition(" ")[2])


def stored(index: int, name: str) -> str:
    """Return what a block's tensor is called in a pack."""
    return f"{index}.{name}"


def _find(module: nn.Module, path: str) -> nn.ModuleList:
    lists = {
        name: len(child)
        for name, child in module.named_modules()
        if type(child) is nn.ModuleList and name
    }
    try:
        found: nn.Module | None = module.get_submodule(path) if path else None
    except AttributeError:
        found = None
    if type(found) is nn.ModuleList and len(found):
        return found
    near = get_close_matches(path, lists, n=1, cutoff=0.0) if lists else []
    raise UsageError(
        f"{path!r} is not a list of blocks of this {type(module).__name__}",
        expected=", ".join(f"{name!r} ({count})" for name, count in lists.items())
        or "a module with an nn.ModuleList",
        found="nothing of that name" if found is None else type(found).__name__,
        remedy=f"Did you mean blocks={near[0]!r}?" if near else None,
    )


def _places(module: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return where ``child`` is reached from."""
    return [
        (parent, name)
        for parent in module.modules()
        for name, found in parent._modules.items()
        if found is child
    ]


def _outside(module: nn.Module, lists: Collection[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters that are reached without going through ``lists``."""
    seen = {id(each) for each in lists}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield from (p for p in current._parameters.values() if p is not None)
        waiting += [child for child in current._modules.values() if child is not None]


def check_unstreamed(module: nn.Module) -> None:
    """Refuse a module whose weights are away, or that would not notice.

    Raises:
        UsageError: it is streamed already, or keeps a second list of its weights.
    """
    if any(isinstance(p, AwayWeight) for p in module.parameters()):
        raise UsageError(
            "the module is being streamed already",
            expected="one stream a module",
            remedy="Name all its lists of blocks in one call, or close the first stream",
        )
    for name, inner in module.named_modules():
        if hasattr(inner, "_flat_weights"):
            raise UsageError(
                f"{name} cannot be streamed",
                expected="modules that look their weights up when they compute",
                found=f"{type(inner).__name__}, which keeps a second list of them",
            )


def _linears(block: nn.Module, leaving: Collection[int]) -> Iterator[FoundLinear]:
    uses = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
    for prefix, parent in block.named_modules():
        for leaf, child in parent._modules.items():
            # Subclasses have a reason of their own; their weights are often read directly.
            if type(child) is nn.Linear:
                key = id(child.weight)
                if key in leaving and uses[key] == 1:
                    yield FoundLinear(f"{prefix}.{leaf}".lstrip("."), parent, leaf, child)


class Quantised:
    """The linear layers of all blocks in a format, in the places of the plain ones.

    Args:
        patient: taken apart.
        fmt: how they are stored.
        keep: ends of names of layers that stay as they are.
        value: gives a weight with its values.
    """

    def __init__(
        self,
        patient: Patient,
        fmt: QuantFormat,
        keep: Collection[str],
        value: Callable[[Tensor], Tensor],
    ) -> None:
        self._patient, self.format, self._value = patient, fmt, value
        self.linears = patient.linears(fmt, keep)
        if not any(self.linears):
            raise UsageError(
                f"nothing in the blocks can be stored as {fmt.name}",
                expected="nn.Linear layers" + (f" besides {', '.join(keep)}" if keep else ""),
                found="none whose weight is used once and has a fitting shape",
                remedy="Stream the module without a format.",
            )

    @property
    def scratch_bytes(self) -> int:
        """Of the largest of them, decoded."""
        return max(
            scratch_bytes([(self.format, each.shape)], dtype_tag(each.module.weight.dtype))
            for linears in self.linears
            for each in linears
        )

    def workspace_bytes(self, device: str) -> int:
        """Return what decoding one of them makes for a moment, on a device of that type."""
        return max(
            self.format.workspace_bytes(each.shape, device)
            for linears in self.linears
            for each in linears
        )

    def specs(self, plain: Mapping[str, Mapping[str, Spec]]) -> dict[str, dict[str, Spec]]:
        """Return what is stored, by run and name, where ``plain`` is stored unquantised."""
        made = {}
        for index, linears in enumerate(self.linears):
            specs = dict(plain[run_name(index)])
            for each in linears:
                del specs[stored(index, f"{each.name}.weight")]
                storage = self.format.storage(each.shape, dtype_tag(each.module.weight.dtype))
                specs |= {stored(index, f"{each.name}.{s}"): spec for s, spec in storage.items()}
            made[run_name(index)] = specs
        return made

    def values(self, run: str) -> Iterator[Tensor]:
        """Yield the tensors of a run, in the order of `specs`; one layer at a time is quantised."""
        index = _index(run)
        weights = self._patient.weights[index]
        done = {f"{each.name}.weight" for each in self.linears[index]}
        yield from (self._value(p) for name, p in weights.items() if name not in done)
        for each in self.linears[index]:
            weight = self._value(each.module.weight).detach().cpu()
            yield from quantise(self.format, weight, each.name).values()

    def install(self, computing: Computing, device: torch.device) -> None:
        """Put quantised layers into the blocks; they answer as the plain ones on a device."""
        for linears in self.linears:
            for each in linears:
                path = strategy_for(computing, self.format, each.shape)
                weight, bias = each.module.weight, each.module.bias is not None
                made = QuantLinear(each.shape, self.format, path, weight.dtype, bias=bias)
                told = f"{each.name}.weight (stored as {self.format.name}; keep= leaves it plain)"
                made.answer(AwayWeight(weight, device, told))
                each.parent._modules[each.leaf] = made

    def remove(self) -> None:
        """Put the plain layers back."""
        for linears in self.linears:
            for each in linears:
                each.parent._modules[each.leaf] = each.module

    def slots(self, index: int, device: torch.device) -> list[Slot]:
        """Return where the tensors of a block's quantised layers go."""
        return [
            Slot(owner, leaf, name, AwayWeight(buffer, device, name), buffer)
            for each in self.linears[index]
            for inner, owner in each.parent.get_submodule(each.leaf).named_modules()
            for leaf, buffer in owner._buffers.items()
            if buffer is not None
            for name in [stored(index, ".".join(filter(None, (each.name, inner, leaf))))]
        ]


class Emptied:
    """Weights let go, while a pack holds them.

    Args:
        pack: holds them.
        runs: the parameters by run of the pack and by name there.
    """

    def __init__(self, pack: LivePack, runs: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self._pack = pack
        self._homes = {
            run: {name: (p, p.device, p.stride()) for name, p in own.items()}
            for run, own in runs.items()
        }
        for own in runs.values():
            for p in own.values():
                p.data = p.data.new_empty(0)

    def fill(self) -> None:
        """Give every parameter its values back.

        Raises:
            CheckpointError: the pack was damaged; names its runs, whose values are then wrong.
        """
        bad = []
        for run, own in self._homes.items():
            tensors, sound = self._pack.read(run)
            for name, (parameter, device, stride) in own.items():
                if parameter.numel() == 0:  # a weight of two blocks is back already
                    parameter.data = _placed(tensors[name], device, stride)
            if not sound:
                bad.append(run)
        if bad:
            raise CheckpointError(
                f"the weights of {', '.join(bad)} are not those that were put away",
                expected="the bytes that were written",
                found="others (a checksum differs)",
                remedy="Load the module again, and check the disk.",
            )


def _placed(tensor: Tensor, device: torch.device, stride: tuple[int, ...]) -> Tensor:
    """Return ``tensor`` on its device, laid out as it was."""
    if tensor.stride() == stride:
        return tensor.to(device)
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=device)
    return made.copy_(tensor)


def restore(slots: Sequence[Sequence[Slot]]) -> None:
    """Put what was there before into every slot."""
    for own in slots:
        for slot in own:
            slot.restore()
