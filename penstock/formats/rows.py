"""What every format counts with: shapes, specs, and the rows that are in work at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

Shape: TypeAlias = tuple[int, int]
"""Rows (out features) and columns (in features) of a linear weight."""

Spec: TypeAlias = tuple[str, tuple[int, ...]]
"""Dtype tag, as a safetensors header spells it, and shape of one stored tensor."""

_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22


def chunk_elements(device: str) -> int:
    """Return the elements decoded at once on a ``device`` of that type ("cpu", "cuda"): on a CPU
    what stays in the L2 cache, elsewhere what fills the device while its temporaries stay small
    beside a weight.
    """
    return _CPU_CHUNK if device == "cpu" else _DEVICE_CHUNK


def row_slices(rows: int, columns: int, device: str) -> Iterator[slice]:
    """Yield the slices that cover ``rows``, each of about `chunk_elements` elements, at least one
    row."""
    step = max(1, chunk_elements(device) // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def chunk_rows(rows: int, columns: int, device: str) -> int:
    """Return the rows of the largest slice of `row_slices`."""
    return min(rows, max(1, chunk_elements(device) // max(1, columns)))
