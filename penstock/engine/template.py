"""A skeleton that takes the stored tensors of a file, whatever their format.

Quantised linear layers are `QuantLinear`s and take their stored tensors as they lie; the few other
parameters whose stored type is not the compute dtype are cast when they are bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.formats import decode, format_of, is_linear
from penstock.engine.keys import stored_name
from penstock.engine.storage import StoredWeight
from penstock.engine.weights import bind, unbind
from penstock.offload.checkpoint import torch_dtype
from penstock.profiles.manifest import Storage
from penstock.quant.compute import Computing, Dequant, Fp8Gemm, Int8Gemm
from penstock.quant.format import FORMATS, QuantFormat
from penstock.quant.linear import QuantLinear, replace_linears

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Treatment:
    """How the parameters of a block (or of all outside the blocks) are stored, by local name.

    Attributes:
        linears: format of each quantised linear, by its module's name.
        cast: the parameters that are cast when they are bound, with their shapes.
        key: equal for blocks that one skeleton serves.
    """

    linears: Mapping[str, QuantFormat]
    cast: Mapping[str, tuple[StoredWeight, tuple[int, ...]]]
    key: Hashable

    @classmethod
    def of(
        cls,
        weights: Mapping[str, StoredWeight],
        shapes: Shapes,
        dtype: torch.dtype,
        kept: Callable[[str], bool],
    ) -> Treatment:
        """Decide for each of ``weights``.

        Args:
            dtype: to compute in.
            kept: parameters that compute in the type they are stored in, whatever that is.

        Raises:
            CheckpointError: a storage that no format reads.
        """
        linears: dict[str, QuantFormat] = {}
        cast: dict[str, tuple[StoredWeight, tuple[int, ...]]] = {}
        for name, stored in weights.items():
            same = stored.plain and torch_dtype(stored.tensors["weight"].dtype) == dtype
            if same or (stored.plain and kept(name)):
                continue
            if is_linear(name, shapes[name]):
                plain = stored.plain
                linears[name.removesuffix(".weight")] = (
                    FORMATS[stored.label] if plain else format_of(stored)
                )
            else:
                cast[name] = (stored, shapes[name])
        labels = frozenset((name, stored.label) for name, (stored, _) in cast.items())
        return cls(linears, cast, (frozenset(linears.items()), labels))


@dataclass(frozen=True)
class Template:
    """A module on the meta device and the treatment of the tensors that are bound to it."""

    module: Any
    treatment: Treatment
    dtype: torch.dtype

    @classmethod
    def of(
        cls, module: Any, treatment: Treatment, computing: Computing, dtype: torch.dtype
    ) -> Template:
        """Make ``module`` (a skeleton of our own) take tensors of ``treatment``.

        Raises:
            TensorMismatch: a quantised layer that the module lacks.
        """
        replace_linears(module, treatment.linears, computing, dtype)
        return cls(module, treatment, dtype)

    @property
    def cast_bytes(self) -> int:
        """What casting makes, besides the stored tensors, for as long as they are bound."""
        shapes = [shape for _, shape in self.treatment.cast.values()]
        return sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize

    @contextmanager
    def bound(self, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
        """The module with ``tensors`` (by stored name) bound, and unbound whatever happens.

        Raises:
            TensorMismatch: they do not fit the module.
        """
        try:
            bind(self.module, self._ready(tensors))
            yield self.module
        finally:
            unbind(self.module)

    def _ready(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ready = dict(tensors)
        for name, (stored, shape) in self.treatment.cast.items():
            names = {suffix: stored_name(name, suffix) for suffix in stored.tensors}
            if all(each in ready for each in names.values()):
                parts = {suffix: ready.pop(each) for suffix, each in names.items()}
                ready[name] = decode(stored, parts, shape, self.dtype)
        return ready

    def storage(self, device: torch.device, chosen: Callable[[str], bool]) -> Storage:
        """What computing with the linears takes whose weights' names are ``chosen``."""
        layers = [
            layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, QuantLinear) and chosen(f"{name}.weight")
        ]
        decoding = [layer for layer in layers if isinstance(layer.compute, Dequant)]
        sizes = [_elements(layer) * self.dtype.itemsize for layer in decoding]
        work = [layer.format.workspace_bytes(_shape(layer), device) for layer in decoding]
        gemms = [
            layer.compute.chunk_bytes
            for layer in layers
            if isinstance(layer.compute, Fp8Gemm | Int8Gemm)
        ]
        return Storage(
            scratch_bytes=max(sizes, default=0),
            workspace_bytes=max(work, default=0),
            decoded_bytes=sum(sizes),
            eight_bit_bytes=max(gemms, default=0),
        )


def _shape(layer: QuantLinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _elements(layer: QuantLinear) -> int:
    return layer.out_features * layer.in_features


def main_format(weights: Mapping[str, StoredWeight], shapes: Shapes) -> str:
    """The storage of most matrix elements, without the layout of its scales: "fp8", "bf16", ..."""
    counts: dict[str, int] = {}
    for name, stored in weights.items():
        if is_linear(name, shapes[name]):
            label = stored.label.partition(" ")[0]
            counts[label] = counts.get(label, 0) + math.prod(shapes[name])
    return max(counts, key=lambda label: counts[label], default="plain")


def joined(storages: Sequence[Storage], format_name: str, cast_bytes: int) -> Storage:
    """What suits all of ``storages`` (not empty), one at a time, with ``cast_bytes`` besides."""
    return Storage(
        format=format_name,
        scratch_bytes=max(each.scratch_bytes for each in storages),
        workspace_bytes=max(each.workspace_bytes for each in storages) + cast_bytes,
        decoded_bytes=max(each.decoded_bytes for each in storages),
        eight_bit_bytes=max(each.eight_bit_bytes for each in storages),
    )
