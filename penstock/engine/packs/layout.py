"""Tensors placed in a safetensors file so that those needed together are read at once.

Layout: header, padded so that data begins on a page; then runs of tensors, each a contiguous piece
that begins on a page, tensors in it aligned to 64 bytes. What lies between is named padding tensors
of zeros, for safetensors allows no holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.blocks import PAGE_BYTES, TENSOR_ALIGNMENT
from penstock.engine.files.storage import PADDING
from penstock.formats.tags import ITEM_BYTES
from penstock.units import align_up

Spec = tuple[str, tuple[int, ...]]
"""What a tensor is, before it has a place: dtype tag and shape."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor's place: ``offset`` counts from the start of the data, which is a page."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlannedRun:
    """A piece that is read at once, from its first tensor's first byte to its last one's last."""

    name: str
    offset: int
    nbytes: int
    tensors: tuple[PlacedTensor, ...]


def place_runs(runs: Mapping[str, Mapping[str, Spec]]) -> tuple[PlannedRun, ...]:
    """Place ``runs`` (tensors by run and name) one after the other, each from a page on."""
    placed: list[PlannedRun] = []
    end = 0
    for name, specs in runs.items():
        placed.append(_place_run(name, specs, align_up(end, PAGE_BYTES)))
        end = placed[-1].offset + placed[-1].nbytes
    return tuple(placed)


def _place_run(name: str, specs: Mapping[str, Spec], offset: int) -> PlannedRun:
    tensors: list[PlacedTensor] = []
    end = offset
    for tensor_name, (dtype, shape) in specs.items():
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        start = align_up(end, TENSOR_ALIGNMENT)
        tensors.append(PlacedTensor(tensor_name, dtype, tuple(shape), start, nbytes))
        end = start + nbytes
    return PlannedRun(name, offset, end - offset, tuple(tensors))


def header_of(tensors: Iterable[PlacedTensor], metadata: Mapping[str, str]) -> bytes:
    """Write the safetensors header, its length included: whole pages."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor in _padded(tensors):
        place = [tensor.offset, tensor.offset + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place,
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    whole = align_up(8 + len(text), PAGE_BYTES)
    return (whole - 8).to_bytes(8, "little") + text.ljust(whole - 8)


def _padded(tensors: Iterable[PlacedTensor]) -> Iterator[PlacedTensor]:
    """Yield ``tensors`` with padding tensors where they do not touch."""
    end = count = 0
    for tensor in tensors:
        if tensor.offset > end:
            gap = tensor.offset - end
            yield PlacedTensor(f"{PADDING}{count}", "U8", (gap,), end, gap)
            count += 1
        yield tensor
        end = tensor.offset + tensor.nbytes
