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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.formats import is_linear
from penstock.engine.keys import ComponentSource
from penstock.engine.lora import Lora, LoraFile, LoraLayer, open_lora, parameters_of
from penstock.offload.checkpoint import TensorEntry, torch_dtype
from penstock.offload.files import FileStamp
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import LoraSpec
from penstock.profiles.plan import Origin
from penstock.quant.lora import Delta
from penstock.units import format_bytes

_SINGLE = 4  # bytes of an fp32


@dataclass(frozen=True)
class Fold:
    """``scale * up @ down`` or ``scale * diff``, added to a parameter when it is bound.

    Attributes:
        tensors: local names of ``diff``, or of ``up`` and ``down``.
        numel: of the parameter.
    """

    tensors: tuple[str, ...]
    scale: float
    numel: int


@dataclass(frozen=True)
class LoraPart:
    """What LoRAs add in one block, or outside the blocks. Names are local to it.

    Attributes:
        dtype: of the network.
        deltas: by linear layer.
        folds: by parameter.
        cast: elements of each matrix that is stored in another type than the network's.
    """

    dtype: torch.dtype
    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    folds: Mapping[str, tuple[Fold, ...]] = field(default_factory=dict)
    cast: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Most bytes that binding makes: casts, sums, and one sum's fp32 operands."""
        sums = [folds[0].numel for folds in self.folds.values()]
        casts = sum(self.cast.values()) * self.dtype.itemsize
        return casts + _SINGLE * (sum(sums) + 3 * max(sums, default=0))

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` as the layers take them; those of other runs may be absent."""
        if not (self.folds or self.cast):
            return tensors
        made = dict(tensors)
        for name in self.cast.keys() & made.keys():
            made[name] = made[name].to(self.dtype)
        for name, folds in self.folds.items():
            if name in made:
                made[name] = _summed(made, made[name], folds)
        return made


def _summed(made: dict[str, Tensor], base: Tensor, folds: Sequence[Fold]) -> Tensor:
    total = base.to(torch.float32, copy=True)
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

    def parts(self, prefix: str, count: int, dtype: torch.dtype) -> tuple[LoraPart, ...]:
        """What they add outside the blocks, then block by block; nothing if there are none."""
        if not self.files:
            return ()
        found = [_Collected() for _ in range(count + 1)]
        shapes = self.source.shapes
        for index, strength, layer in self.layers():
            place, cut = 0, 0
            if layer.module.startswith(prefix):
                number = layer.module[len(prefix) :].partition(".")[0]
                place, cut = int(number) + 1, len(f"{prefix}{number}.")
            found[place].add(index, strength, layer, shapes, cut, dtype)
        return tuple(LoraPart(dtype, c.deltas, c.folds, c.cast) for c in found)


@dataclass(frozen=True)
class _Collected:
    """A `LoraPart` in the making."""

    deltas: dict[str, tuple[Delta, ...]] = field(default_factory=dict)
    folds: dict[str, tuple[Fold, ...]] = field(default_factory=dict)
    cast: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        index: int,
        strength: float,
        layer: LoraLayer,
        shapes: Mapping[str, tuple[int, ...]],
        cut: int,
        dtype: torch.dtype,
    ) -> None:
        """What ``layer`` adds; ``cut`` characters of its names are not local."""
        weight, bias = parameters_of(layer, shapes)
        named = _named(index, layer)
        local = {name.rpartition(".")[2]: name[cut:] for name in named}
        low_rank = [(("up", "down"), strength * layer.scale)] if layer.down else []
        whole = [(("diff",), strength)] if layer.diff else []
        if weight in shapes and is_linear(weight, shapes[weight]):
            ranks = [Delta(index, layer.rank, scale) for _, scale in low_rank]
            full = [Delta(index, 0, scale) for _, scale in whole]
            if ranks or full:
                name = layer.module[cut:]
                self.deltas[name] = (*self.deltas.get(name, ()), *ranks, *full)
            for role in local.keys() - {"bias"}:
                entry = named[f"{layer.module}.lora.{index}.{role}"]
                if torch_dtype(entry.dtype) != dtype:
                    self.cast[local[role]] = math.prod(entry.shape)
        else:
            for roles, scale in low_rank + whole:
                self._fold(weight[cut:], [local[r] for r in roles], scale, shapes[weight])
        if layer.bias is not None:
            scale = strength * layer.bias_scale
            self._fold(bias[cut:], [local["bias"]], scale, shapes[bias])

    def _fold(self, name: str, tensors: list[str], scale: float, shape: tuple[int, ...]) -> None:
        fold = Fold(tuple(tensors), scale, math.prod(shape))
        self.folds[name] = (*self.folds.get(name, ()), fold)


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
