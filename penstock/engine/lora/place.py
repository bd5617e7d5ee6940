"""Where the tensors of LoRAs go: into the layouts of the blocks they belong to, and from there into
the layers.

A LoRA's tensors are named after the module they change (``blocks.0.attn1.to_q.lora.0.down``), so
that they lie in the same run of bytes as its weights, are read, copied and counted with them, and
come and go with a visit. Matrices are multiplied beside the weight (`penstock.quant.lora`);
everything else (biases, norms, tables, convolutions) is added when it is bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.files.formats import is_linear
from penstock.engine.files.keys import ComponentSource
from penstock.engine.lora.file import Lora, LoraFile, LoraLayer, open_lora, parameters_of
from penstock.engine.store.digest import stamp
from penstock.formats.tags import ITEM_BYTES
from penstock.offload.checkpoint import TensorEntry, torch_dtype
from penstock.offload.files import FileStamp
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import LoraSpec
from penstock.profiles.plan import Origin
from penstock.quant.delta import Delta
from penstock.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

_SINGLE = 4  # bytes of an fp32


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one parameter: ``scale * up @ down``, or ``scale * diff``.

    Attributes:
        parameter: its name; local to a block or to what is outside them, or of the whole network.
        tensors: names of ``up`` and ``down``, or of the difference alone.
        index: which LoRA.
        rank: 0 for a difference.
    """

    parameter: str
    tensors: tuple[str, ...]
    index: int
    rank: int
    scale: float

    def local(self, cut: int) -> Change:
        """Its names without their first ``cut`` characters."""
        tensors = tuple(name[cut:] for name in self.tensors)
        return replace(self, parameter=self.parameter[cut:], tensors=tensors)


@dataclass(frozen=True)
class LoraPart:
    """What LoRAs add in one block, or outside the blocks. Names are local to it.

    Attributes:
        tag: safetensors tag of the network's dtype.
        deltas: by linear layer.
        folds: by parameter: what is added when it is bound.
        sizes: elements of each parameter that is.
        cast: elements of each matrix that is stored in another type than the network's.
    """

    tag: str
    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    folds: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    cast: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Most bytes that binding makes: casts, sums, and one sum's fp32 operands."""
        sums = self.sizes.values()
        casts = sum(self.cast.values()) * ITEM_BYTES[self.tag]
        return casts + _SINGLE * (sum(sums) + 3 * max(sums, default=0))

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` as the layers take them; those of other runs may be absent."""
        if not (self.folds or self.cast):
            return tensors
        made = dict(tensors)
        for name in self.cast.keys() & made.keys():
            made[name] = made[name].to(torch_dtype(self.tag))
        for name, folds in self.folds.items():
            if name in made:
                made[name] = _summed(made, made[name], folds)
        return made


def _summed(made: dict[str, Tensor], base: Tensor, folds: Sequence[Change]) -> Tensor:
    total = base.to(torch_dtype("F32"), copy=True)
    for fold in folds:
        parts = [made.pop(name) for name in fold.tensors]
        total.add_(delta_of(parts, total.shape), alpha=fold.scale)
    return total.to(base.dtype)


def delta_of(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """``diff``, or ``up @ down``, in fp32 and of ``shape``; further dimensions count as columns."""
    if len(parts) == 1:
        return parts[0].float().view(shape)
    up, down = (part.float().flatten(1) for part in parts)
    return (up @ down).view(shape)


@dataclass(frozen=True)
class PlacedLoras:
    """Open LoRAs, checked against a transformer.

    Attributes:
        given: what was asked for.
        files: the opened file of each.
    """

    source: ComponentSource
    given: tuple[Lora, ...]
    files: tuple[LoraFile, ...]

    @classmethod
    def open(cls, source: ComponentSource, loras: Sequence[Lora]) -> PlacedLoras:
        """Open ``loras``; reads headers and alphas.

        Raises:
            CheckpointError: a file cannot be used, or was made for another model.
        """
        files = tuple(open_lora(lora.path) for lora in loras)
        for file in files:
            file.check(source)
        return cls(source, tuple(loras), files)

    @property
    def stamps(self) -> dict[Path, FileStamp]:
        """All files, as they were when their headers were read."""
        return {path: stamp for file in self.files for path, stamp in file.stamps.items()}

    def origins(self) -> tuple[Origin, ...]:
        """One line a LoRA, for plans."""
        return tuple(
            Origin(
                "LoRA",
                f"{lora.path.name} at strength {lora.strength:g}, "
                f"{format_bytes(file.nbytes)} beside the weights",
                "flag",
            )
            for lora, file in zip(self.given, self.files, strict=True)
        )

    def numerics(self) -> list[dict[str, object]]:
        """What of them alters a result, besides their files."""
        return [
            {"strength": lora.strength, "scales": sorted({la.scale for la in file.layers.values()})}
            for lora, file in zip(self.given, self.files, strict=True)
        ]

    def merged_names(self) -> list[dict[str, Any]]:
        """File name, strength, size and hash of each, for the metadata of a pack that holds them.

        Raises:
            StorageError: a file cannot be read.
        """
        return [
            {"file": path.name, "strength": lora.strength, **stamp(path)}
            for lora, file in zip(self.given, self.files, strict=True)
            for path in file.stamps
        ]

    def layers(self) -> Iterator[tuple[int, float, LoraLayer]]:
        """Which LoRA, its strength, and what it adds to one module."""
        for index, (lora, file) in enumerate(zip(self.given, self.files, strict=True)):
            for layer in file.layers.values():
                yield index, lora.strength, layer

    def entries(self) -> dict[str, TensorEntry]:
        """Places of all tensors, by the names they have in layouts."""
        return {
            name: entry
            for index, _, layer in self.layers()
            for name, entry in _named(index, layer).items()
        }

    def changes(self) -> Iterator[Change]:
        """What is added to each parameter of the network."""
        shapes = self.source.shapes
        for index, strength, layer in self.layers():
            weight, bias = parameters_of(layer, shapes)
            named = {name.rpartition(".")[2]: name for name in _named(index, layer)}
            if layer.rank:
                pair, scale = (named["up"], named["down"]), strength * layer.scale
                yield Change(weight, pair, index, layer.rank, scale)
            if "diff" in named:
                yield Change(weight, (named["diff"],), index, 0, strength)
            if "bias" in named:
                yield Change(bias, (named["bias"],), index, 0, strength * layer.bias_scale)

    def parts(self, prefix: str, count: int, tag: str) -> tuple[LoraPart, ...]:
        """What they add outside the blocks, then block by block; nothing if there are none."""
        if not self.files:
            return ()
        groups: list[list[Change]] = [[] for _ in range(count + 1)]
        cuts = [0, *(len(f"{prefix}{index}.") for index in range(count))]
        for change in self.changes():
            name = change.parameter
            number = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
            place = int(number) + 1 if number else 0
            groups[place].append(change)
        entries, shapes = self.entries(), self.source.shapes
        return tuple(
            _part(group, cut, tag, entries, shapes) for group, cut in zip(groups, cuts, strict=True)
        )


def _part(
    changes: Sequence[Change],
    cut: int,
    tag: str,
    entries: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
) -> LoraPart:
    part = _PartMaker({}, {}, {}, {})
    for change in changes:
        local, shape = change.local(cut), shapes[change.parameter]
        if not is_linear(change.parameter, shape):
            part.fold(local, math.prod(shape))
            continue
        part.multiply(local)
        for name, place in zip(local.tensors, change.tensors, strict=True):
            if entries[place].dtype != tag:
                part.cast[name] = math.prod(entries[place].shape)
    return LoraPart(tag, part.deltas, part.folds, part.sizes, part.cast)


@dataclass(frozen=True)
class _PartMaker:
    deltas: dict[str, tuple[Delta, ...]]
    folds: dict[str, tuple[Change, ...]]
    sizes: dict[str, int]
    cast: dict[str, int]

    def multiply(self, change: Change) -> None:
        """Beside the weight of a linear layer."""
        layer = change.parameter.removesuffix(".weight")
        delta = Delta(change.index, change.rank, change.scale)
        self.deltas[layer] = (*self.deltas.get(layer, ()), delta)

    def fold(self, change: Change, numel: int) -> None:
        """Into any other parameter."""
        name = change.parameter
        self.folds[name] = (*self.folds.get(name, ()), change)
        self.sizes[name] = numel


def _named(index: int, layer: LoraLayer) -> dict[str, TensorEntry]:
    """The tensors of ``layer`` by the names they have in layouts."""
    parts = {"down": layer.down, "up": layer.up, "diff": layer.diff, "bias": layer.bias}
    start = f"{layer.module}.lora.{index}."
    return {start + role: entry for role, entry in parts.items() if entry is not None}


def lora_spec(parts: Sequence[LoraPart], blocks: Sequence[BlockLayout]) -> LoraSpec:
    """What the planner must know: the rank that activations have, and the work of a pass."""
    ranks = [d.rank for part in parts for deltas in part.deltas.values() for d in deltas]
    elements = sum(
        math.prod(place.shape)
        for layout in blocks
        for name, place in layout.places.items()
        if ".lora." in name and len(place.shape) == 2
    )
    return LoraSpec(max(ranks, default=0), elements)
