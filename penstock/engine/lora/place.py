"""Where the tensors of LoRAs go: into the layouts of the blocks they belong to, and from there into
the layers.

A LoRA's tensors are named after the module they change (``blocks.0.attn1.to_q.lora.0.down``), so
that they lie in the same run of bytes as its weights, are read, copied and counted with them, and
come and go with a visit. Sums of matrices are multiplied beside the weight (`penstock.quant.lora`);
what needs the weight's values changes them where they are decoded (`penstock.formats.patched`);
everything else (biases, norms, tables, convolutions, and what needs the values of a matrix outside
the blocks) is done when it is bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.files.formats import is_linear
from penstock.engine.files.keys import ComponentSource
from penstock.engine.lora.file import FittedLora, Lora, open_lora
from penstock.engine.lora.find import found_in
from penstock.engine.lora.layer import LoraLayer, parameters_of
from penstock.engine.store.digest import stamp
from penstock.errors import UsageError
from penstock.formats.patch import Patch
from penstock.formats.rows import Shape
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
    """What one LoRA does to one parameter.

    Attributes:
        parameter: its name; local to a block or to what is outside them, or of the whole network.
        module: its tensors' names begin with this, local or whole as ``parameter``.
        patch: what is done.
    """

    parameter: str
    module: str
    patch: Patch

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors, by the order of the patch's roles."""
        return tuple(f"{self.module}.{self.patch.name(role)}" for role in self.patch.roles)

    def local(self, cut: int) -> Change:
        """Return its names without their first ``cut`` characters."""
        return replace(self, parameter=self.parameter[cut:], module=self.module[cut:])

    def apply(self, weight: Tensor, tensors: Mapping[str, Tensor], first: int = 0) -> None:
        """Change ``weight`` in place, as `penstock.quant.values.patch.apply`.

        Args:
            weight: of any shape; dimensions beyond the second count as columns.
            tensors: by the names here.
        """
        from penstock.quant.values.patch import apply

        given = {
            role: tensors[name] for role, name in zip(self.patch.roles, self.tensors, strict=True)
        }
        rows = weight if weight.dim() > 1 else weight[None]
        apply(self.patch, rows.view(len(rows), -1), given, first)


@dataclass(frozen=True)
class LoraPart:
    """What LoRAs do in one block, or outside the blocks. Names are local to it.

    Attributes:
        tag: safetensors tag of the network's dtype.
        deltas: by linear layer: what is added beside it.
        patches: by linear layer: what changes its weight, whenever that is decoded.
        folds: by parameter: what is done to it when it is bound.
        sizes: shape of each parameter of ``folds``.
        cast: elements of each matrix that is stored in another type than the network's.
    """

    tag: str
    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    patches: Mapping[str, tuple[Patch, ...]] = field(default_factory=dict)
    folds: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cast: Mapping[str, int] = field(default_factory=dict)

    def nbytes(self, device: str) -> int:
        """Return the most bytes that binding makes on a device of that type: casts, changed
        parameters, and what one change takes."""
        casts = sum(self.cast.values()) * ITEM_BYTES[self.tag]
        made = sum(self._made(name) for name in self.folds)
        working = [
            change.patch.workspace_bytes(_matrix(self.sizes[name]), device)
            + self._made(name) * (not is_linear(name, self.sizes[name]))
            for name, changes in self.folds.items()
            for change in changes
        ]
        return casts + made + max(working, default=0)

    def _made(self, name: str) -> int:
        shape = self.sizes[name]
        item = ITEM_BYTES[self.tag] if is_linear(name, shape) else _SINGLE
        return item * math.prod(shape)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``tensors`` as the layers take them; those of other runs may be absent."""
        if not (self.folds or self.cast):
            return tensors
        made = dict(tensors)
        for name in self.cast.keys() & made.keys():
            made[name] = made[name].to(torch_dtype(self.tag))
        for name, changes in self.folds.items():
            if name in made:
                made[name] = self._changed(made, name, changes)
        return made

    def _changed(self, made: dict[str, Tensor], name: str, changes: Sequence[Change]) -> Tensor:
        """Change ``weight``: a matrix as it is, rounded once a LoRA; the rest, which is small, in
        fp32."""
        base = made[name]
        matrix = is_linear(name, self.sizes[name])
        total = base.clone() if matrix else base.to(torch_dtype("F32"), copy=True)
        for change in changes:
            change.apply(total, {tensor: made.pop(tensor) for tensor in change.tensors})
        return total.to(base.dtype)


def check_one(loras: Sequence[Lora]) -> None:
    """Refuse a LoRA that is said to be for one of two transformers, where there is one.

    Raises:
        UsageError: names it.
    """
    for lora in loras:
        if lora.expert in ("high", "low"):
            raise UsageError(
                f"{lora.path} is for the transformer for {lora.expert} noise",
                expected="a model of two transformers (Wan2.2 A14B)",
                found="a model of one",
                remedy=f"Leave @{lora.expert} out.",
            )


def _fitted(source: ComponentSource, loras: Sequence[Lora]) -> tuple[FittedLora, ...]:
    return tuple(open_lora(lora.path).fitted(source, strict=lora.strict) for lora in loras)


def _matrix(shape: Sequence[int]) -> Shape:
    """Return a parameter of ``shape`` as `Change.apply` sees it."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


@dataclass(frozen=True)
class PlacedLoras:
    """Open LoRAs, checked against a transformer.

    Attributes:
        given: those that are applied to it.
        files: the opened file of each, and what of it is applied.
        asked: all that were asked for, those of a second transformer too.
        second: those of the second transformer; None: there is none.
    """

    source: ComponentSource
    given: tuple[Lora, ...]
    files: tuple[FittedLora, ...]
    asked: tuple[Lora, ...] = ()
    second: PlacedLoras | None = None

    @classmethod
    def open(
        cls,
        source: ComponentSource,
        loras: Sequence[Lora],
        folders: Sequence[Path] = (),
        second: ComponentSource | None = None,
    ) -> PlacedLoras:
        """Open ``loras``; reads headers and alphas.

        Args:
            folders: where a file that is given by its name is looked for.
            second: the second transformer; each LoRA goes to the one that it is for, or to both.

        Raises:
            CheckpointError: a file cannot be used, or was made for another model.
            UsageError: one is for one of two transformers, and there is one.
        """
        asked = tuple(found_in(lora, folders) for lora in loras)
        if second is None:
            check_one(asked)
            return cls(source, asked, _fitted(source, asked), asked)
        high = tuple(lora for lora in asked if lora.is_for("high"))
        low = tuple(lora for lora in asked if lora.is_for("low"))
        other = cls(second, low, _fitted(second, low))
        return cls(source, high, _fitted(source, high), asked, other)

    @property
    def every(self) -> tuple[PlacedLoras, ...]:
        """Of each transformer."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is to be said of tensors that are left out."""
        files = [file for part in self.every for file in part.files]
        return tuple(dict.fromkeys(each.notice for each in files if each.notice is not None))

    @property
    def stamps(self) -> dict[Path, FileStamp]:
        """All files, as they were when their headers were read."""
        return {path: stamp for file in self.files for path, stamp in file.file.stamps.items()}

    def origins(self) -> tuple[Origin, ...]:
        """Return one line a LoRA and transformer, for plans."""
        names = ("",) if self.second is None else (" for high noise", " for low noise")
        return tuple(
            Origin(
                "LoRA",
                f"{lora.path.name} at strength {lora.strength:g}{name}, "
                f"{format_bytes(file.nbytes)} beside the weights" + _left(file),
                "flag",
            )
            for name, part in zip(names, self.every, strict=True)
            for lora, file in zip(part.given, part.files, strict=True)
        )

    def numerics(self) -> list[dict[str, object]]:
        """Return what of them alters a result, besides their files."""
        return [
            {"strength": lora.strength, "scales": sorted({la.scale for la in file.layers.values()})}
            | ({} if self.second is None else {"transformer": number})
            for number, part in enumerate(self.every)
            for lora, file in zip(part.given, part.files, strict=True)
        ]

    def merged_names(self) -> list[dict[str, Any]]:
        """Return the file name, strength, size and hash of each, for the metadata of a pack that
        holds them.

        Raises:
            StorageError: a file cannot be read.
        """
        return [
            {"file": path.name, "strength": lora.strength, **stamp(path)}
            for lora, file in zip(self.given, self.files, strict=True)
            for path in file.file.stamps
        ]

    def layers(self) -> Iterator[tuple[int, float, LoraLayer]]:
        """Yield which LoRA, its strength, and what it adds to one module."""
        for index, (lora, file) in enumerate(zip(self.given, self.files, strict=True)):
            for layer in file.layers.values():
                yield index, lora.strength, layer

    def entries(self) -> dict[str, TensorEntry]:
        """Return the places of all tensors, by the names they have in layouts."""
        return {
            name: entry
            for index, _, layer in self.layers()
            for name, entry in _named(index, layer).items()
        }

    def changes(self) -> Iterator[Change]:
        """Yield what is done to each parameter of the network."""
        shapes = self.source.shapes
        for index, strength, layer in self.layers():
            weight, bias = parameters_of(layer, shapes)
            for change in layer.weights:
                patch = change.patch(index, strength, shapes[weight][0])
                yield Change(weight, layer.module, replace(patch, turned=layer.turned))
            if layer.bias is not None:
                spec = (("bias", (layer.bias.dtype, layer.bias.shape)),)
                patch = Patch(index, "diff", strength * layer.bias_scale, 1.0, spec)
                yield Change(bias, layer.module, patch)

    def parts(self, prefix: str, count: int, tag: str) -> tuple[LoraPart, ...]:
        """Return what they add outside the blocks, then block by block; nothing if there are
        none."""
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


def _left(file: FittedLora) -> str:
    count = sum(len(miss.names) for miss in file.left_out)
    return f", {count} of its {file.file.tensors} tensors left out" if count else ""


def _part(
    changes: Sequence[Change],
    cut: int,
    tag: str,
    entries: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
) -> LoraPart:
    deltas: dict[str, tuple[Delta, ...]] = {}
    patches: dict[str, tuple[Patch, ...]] = {}
    folds: dict[str, tuple[Change, ...]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    cast: dict[str, int] = {}
    for parameter, found in _by_parameter(changes).items():
        shape, name = shapes[parameter], parameter[cut:]
        local = tuple(change.local(cut) for change in found)
        linear = is_linear(parameter, shape)
        sums = [_delta(change.patch, shape) for change in local] if linear else [None]
        if all(sums):
            deltas[name.removesuffix(".weight")] = tuple(delta for delta in sums if delta)
            cast |= _casts(local, found, tag, entries)
        elif linear and cut:
            patches[name.removesuffix(".weight")] = tuple(change.patch for change in local)
        else:
            folds[name], sizes[name] = local, shape
    return LoraPart(tag, deltas, patches, folds, sizes, cast)


def _by_parameter(changes: Sequence[Change]) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.parameter, []).append(change)
    return found


def _delta(patch: Patch, shape: tuple[int, ...]) -> Delta | None:
    """Return ``patch`` as a product beside a linear layer of ``shape``; None if it needs the
    weight."""
    dims = {role: dims for role, (_, dims) in patch.tensors}
    rank, scale = dims.get("down", (0,))[0], patch.strength * patch.scale
    delta = Delta(patch.index, rank, scale, patch.turned)
    rows, columns = shape
    wanted = delta.tensors((rows, columns))
    same = wanted == {patch.name(role): found for role, found in dims.items()}
    return delta if patch.is_sum and same else None


def _casts(
    local: Sequence[Change], found: Sequence[Change], tag: str, entries: Mapping[str, TensorEntry]
) -> dict[str, int]:
    """Return the elements of each tensor that is not stored in the network's type."""
    return {
        name: math.prod(entries[place].shape)
        for here, there in zip(local, found, strict=True)
        for name, place in zip(here.tensors, there.tensors, strict=True)
        if entries[place].dtype != tag
    }


def _named(index: int, layer: LoraLayer) -> dict[str, TensorEntry]:
    """Return the tensors of ``layer`` by the names they have in layouts."""
    start = f"{layer.module}.lora.{index}."
    parts = {role: e for change in layer.weights for role, e in change.entries.items()}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {start + role: entry for role, entry in parts.items()}


def lora_spec(parts: Sequence[LoraPart], blocks: Sequence[BlockLayout]) -> LoraSpec:
    """Return what the planner must know: the rank that activations have, and the work of a pass."""
    ranks = [d.rank for part in parts for deltas in part.deltas.values() for d in deltas]
    elements = sum(
        math.prod(layout.places[name].shape)
        for part, layout in zip(parts[1:], blocks, strict=False)
        for layer, deltas in part.deltas.items()
        for delta in deltas
        for role in ("down", "up", "diff")
        if (name := f"{layer}.{delta.name(role)}") in layout.places
    )
    return LoraSpec(max(ranks, default=0), elements)
