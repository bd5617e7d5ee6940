"""What a LoRA does to a weight, from the tensors that its file has for it; and whether that fits.

Free of torch. `penstock.formats.patch` says what each kind means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from penstock.formats.patch import MAGNITUDE, Kind, Patch
from penstock.offload.checkpoint import TensorEntry

Dims: TypeAlias = tuple[int, ...]
_WITH_MAGNITUDE = ("lora", "loha", "lokr")


@dataclass(frozen=True)
class WeightChange:
    """What a LoRA does to one weight.

    Attributes:
        kind: as `penstock.formats.patch.Kind`.
        entries: its tensors by role.
        scale: alpha / rank; of oft and boft alpha, 0 without one.
        reshape: the shape that the weight is first filled up to with zeros; None: its own.
    """

    kind: Kind
    entries: Mapping[str, TensorEntry]
    scale: float = 1.0
    reshape: Dims | None = None

    @property
    def rank(self) -> int:
        """Of its low-rank factors; 0 where it has none."""
        return _rank(self.kind, {role: entry.shape for role, entry in self.entries.items()})

    def patch(self, index: int, strength: float, rows: int) -> Patch:
        """For the LoRA number ``index``, of a weight of ``rows`` rows."""
        spec = tuple((role, (e.dtype, e.shape)) for role, e in self.entries.items())
        # LyCORIS bounds the whole layer's rotation by alpha times its outputs.
        scale = self.scale * rows if self.kind in ("oft", "boft") else self.scale
        return Patch(index, self.kind, strength, scale, spec)


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA does to one module.

    Attributes:
        module: diffusers' name of it; of a bare parameter (a modulation table), its own.
        weights: what it does to the weight, mostly one thing.
        bias: added to the bias, times ``bias_scale``.
        said: as `penstock.engine.lora.keys.KeyPart`.
        turned: the halves of its rows are in another order than the model's.
    """

    module: str
    weights: tuple[WeightChange, ...] = ()
    bias: TensorEntry | None = None
    bias_scale: float = 1.0
    said: tuple[tuple[str, Any], ...] = ()
    turned: bool = False

    @property
    def rank(self) -> int:
        """0 where there is no low-rank part."""
        return max((change.rank for change in self.weights), default=0)

    @property
    def scale(self) -> float:
        """alpha / rank of what is done to the weight; 1.0 where that has none."""
        return next((change.scale for change in self.weights if change.rank), 1.0)

    def entries(self) -> tuple[TensorEntry, ...]:
        """Return its tensors."""
        found = [entry for change in self.weights for entry in change.entries.values()]
        return (*found, *([] if self.bias is None else [self.bias]))


def parameters_of(layer: LoraLayer, shapes: Mapping[str, Dims]) -> tuple[str, str]:
    """Return the names of the weight and of the bias that ``layer`` changes; the weight of a bare
    parameter is the parameter."""
    weight = f"{layer.module}.weight"
    bare = weight not in shapes and layer.module in shapes
    return layer.module if bare else weight, f"{layer.module}.bias"


@dataclass(frozen=True)
class Misfit:
    """Tensors that have no place in a model: their names, what would have one, and what came."""

    names: tuple[str, ...]
    expected: str
    found: str
    why: str


def fit(
    layers: Iterable[LoraLayer], shapes: Mapping[str, Dims]
) -> tuple[tuple[LoraLayer, ...], tuple[Misfit, ...]]:
    """Return what of ``layers`` can be applied to a model of these ``shapes``, and what cannot."""
    fitting: list[LoraLayer] = []
    wrong: list[Misfit] = []
    for layer in layers:
        weight, bias = parameters_of(layer, shapes)
        weights = [(change, _arranged(change, shapes.get(weight))) for change in layer.weights]
        wrong += [
            _misfit(tuple(change.entries.values()), shapes.get(weight))
            for change, fitted in weights
            if fitted is None
        ]
        kept_bias = layer.bias
        if kept_bias is not None and kept_bias.shape != shapes.get(bias):
            wrong.append(_misfit((kept_bias,), shapes.get(bias)))
            kept_bias = None
        kept = tuple(fitted for _, fitted in weights if fitted is not None)
        if kept or kept_bias is not None:
            fitting.append(replace(layer, weights=kept, bias=kept_bias))
    return tuple(fitting), tuple(wrong)


def _misfit(entries: tuple[TensorEntry, ...], shape: Dims | None) -> Misfit:
    first, names = entries[0], tuple(entry.name for entry in entries)
    found = str(list(first.shape))
    if shape is None:
        return Misfit(names, f"no {first.name}", found, "the model has no such layer")
    wanted = f"{first.name} for a weight of shape {list(shape)}"
    return Misfit(names, wanted, found, f"{found} beside a weight of {list(shape)}")


def _arranged(change: WeightChange, shape: Dims | None) -> WeightChange | None:
    """Return ``change`` as it is applied to a weight of ``shape``; None if it cannot be."""
    if shape is None:
        return None
    dims = {role: entry.shape for role, entry in change.entries.items()}
    if change.kind in ("diff", "set"):
        return change if dims[change.kind] == shape else None
    if len(shape) < 2 or not _magnitude_fits(dims.get(MAGNITUDE), shape):
        return None
    if change.kind == "glora" and not _FITS["glora"](change, dims, shape):
        # An older order of LyCORIS': b2 b1 + W a2 a1.
        turned = {_TURNED_ROUND[role]: entry for role, entry in change.entries.items()}
        change = replace(change, entries=MappingProxyType(turned))
        dims = {role: entry.shape for role, entry in turned.items()}
    return change if _FITS[change.kind](change, dims, shape) else None


_TURNED_ROUND = MappingProxyType({"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"})


def _magnitude_fits(magnitude: Dims | None, shape: Dims) -> bool:
    """Return one norm a row, or one a column."""
    by_row = magnitude is not None and math.prod(magnitude) == magnitude[:1][0] == shape[0]
    return magnitude is None or by_row or magnitude == (1, *shape[1:])


def _lora_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    wide = shape if change.reshape is None else change.reshape
    # More inputs than the model feeds are zeros there: that is so of its first layer alone.
    grown = wide == shape or (len(wide) == len(shape) > 2 and wide[1] >= shape[1])
    same = wide[:1] + wide[2:] == shape[:1] + shape[2:]
    up, down = dims["up"], dims["down"]
    return (
        grown and same
        and math.prod(up) == shape[0] * down[0] and up[0] == shape[0]
        and math.prod(down[1:]) == math.prod(wide[1:])
    )  # fmt: skip


def _loha_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    made = [(dims[f"{w}_a"][0], math.prod(dims[f"{w}_b"][1:])) for w in ("w1", "w2")]
    return made == [(shape[0], math.prod(shape[1:]))] * 2


def _lokr_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    made = [
        dims[w] if w in dims else (dims[f"{w}_a"][0], *dims[f"{w}_b"][1:]) for w in ("w1", "w2")
    ]
    rows, columns = (made[0][0] * made[1][0], math.prod(made[0][1:]) * math.prod(made[1][1:]))
    return (rows, columns) == (shape[0], math.prod(shape[1:])) and len(made[0]) == 2


def _glora_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    rank = dims["a2"][0]
    return len(shape) == 2 and dims == {
        "a1": (shape[1], rank), "a2": (rank, shape[1]), "b1": (shape[0], rank),
        "b2": (rank, shape[1]),
    }  # fmt: skip


def _oft_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    count, size, _ = dims["blocks"]
    return count * size == shape[0] and math.prod(dims.get("rescale", shape[:1])) == shape[0]


def _boft_fits(change: WeightChange, dims: Mapping[str, Dims], shape: Dims) -> bool:
    stages, count, size, _ = dims["blocks"]
    whole = size % 2 == 0 and shape[0] % (2 ** (stages - 1) * size) == 0 if stages else False
    fits = count * size == shape[0] and math.prod(dims.get("rescale", shape[:1])) == shape[0]
    return whole and fits


_FITS: Mapping[str, Callable[[WeightChange, Mapping[str, Dims], Dims], bool]] = MappingProxyType({
    "lora": _lora_fits, "loha": _loha_fits, "lokr": _lokr_fits, "glora": _glora_fits,
    "oft": _oft_fits, "boft": _boft_fits,
})  # fmt: skip


def _rank(kind: str, dims: Mapping[str, Dims]) -> int:
    """Return what alpha is divided by; 0: nothing."""
    factor = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w2_b", "w1_b")}
    if kind == "glora":
        return min(dims["a2"])  # whichever way it lies
    return next((dims[role][0] for role in factor.get(kind, ()) if role in dims), 0)


@dataclass(frozen=True)
class Incomplete:
    """Why the tensors of a module make no change: what was expected, and what was found."""

    expected: str
    found: str


def changes_of(
    module: str, parts: Mapping[str, TensorEntry]
) -> tuple[WeightChange, ...] | Incomplete:
    """Return what a file does to the weight of ``module``, at scale 1, from its tensors by role."""
    found: list[WeightChange] = []
    for kind in ("lora", "loha", "lokr", "glora", "oft", "diff", "set"):
        entries = _of_kind(kind, parts)
        if not entries:
            continue
        dims = {role: entry.shape for role, entry in entries.items()}
        fault = _FAULTS[kind](dims) if kind in _FAULTS else None
        if fault is not None:
            shown = ", ".join(f"{e.name} {list(e.shape)}" for e in entries.values())
            return Incomplete(
                f"{fault} of {module}", shown if len(entries) > 1 else f"{shown} alone"
            )
        if kind in _WITH_MAGNITUDE and MAGNITUDE in parts:
            entries[MAGNITUDE] = parts[MAGNITUDE]
        found.append(WeightChange(_turning(kind, dims), MappingProxyType(entries)))
    return tuple(found)


def _of_kind(kind: str, parts: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return its tensors by the roles they have there."""
    if kind == "lora":
        return {role: parts[role] for role in ("down", "up") if role in parts}
    if kind in ("diff", "set"):
        return {kind: parts[kind]} if kind in parts else {}
    start = f"{kind} "
    return {role[len(start) :]: e for role, e in parts.items() if role.startswith(start)}


def _turning(kind: str, dims: Mapping[str, Dims]) -> Kind:
    kinds: dict[str, Kind] = {
        "lora": "lora", "loha": "loha", "lokr": "lokr", "glora": "glora", "diff": "diff",
        "set": "set", "oft": "boft" if len(dims.get("blocks", ())) == 4 else "oft",
    }  # fmt: skip
    return kinds[kind]


def _lora_fault(dims: Mapping[str, Dims]) -> str | None:
    if dims.keys() != {"down", "up"}:
        return "both matrices"
    down, up = dims["down"], dims["up"]
    shared = len(down) >= 2 and len(up) >= 2 and down[0] == up[1] and down[0] > 0
    return None if shared else "matrices that share a rank of 1 or more,"


def _pairs_fault(names: tuple[str, ...]) -> Callable[[Mapping[str, Dims]], str | None]:
    """Return each of ``names`` as it is, or as a pair "name_a" (rows, rank), "name_b" (rank,
    ...)."""

    def fault(dims: Mapping[str, Dims]) -> str | None:
        for name in names:
            whole, a, b = (dims.get(name + end) for end in ("", "_a", "_b"))
            if (whole is None) == (a is None and b is None) or (a is None) != (b is None):
                return "all matrices"
            if whole is not None and len(whole) < 2:
                return "matrices"
            if a is None or b is None:
                continue
            if len(a) != 2 or len(b) < 2 or a[1] != b[0] or not b[0]:
                return "matrices that share a rank of 1 or more,"
        return None

    return fault


def _glora_fault(dims: Mapping[str, Dims]) -> str | None:
    if dims.keys() != {"a1", "a2", "b1", "b2"}:
        return "all four matrices"
    return None if all(len(d) == 2 and min(d) > 0 for d in dims.values()) else "four matrices"


def _oft_fault(dims: Mapping[str, Dims]) -> str | None:
    blocks = dims.get("blocks", ())
    square = len(blocks) in (3, 4) and blocks[-1] == blocks[-2] > 0
    return None if square else "square blocks"


_FAULTS: Mapping[str, Callable[[Mapping[str, Dims]], str | None]] = MappingProxyType({
    "lora": _lora_fault, "loha": _pairs_fault(("w1", "w2")), "lokr": _pairs_fault(("w1", "w2")),
    "glora": _glora_fault, "oft": _oft_fault,
})  # fmt: skip
