"""What every format needs: dtype tags, walking a weight by rows, refusing NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from penstock.errors import CheckpointError

Shape: TypeAlias = tuple[int, int]
"""Rows (out features) and columns (in features) of a linear weight."""

Spec: TypeAlias = tuple[str, tuple[int, ...]]
"""Dtype tag, as a safetensors header spells it, and shape of one stored tensor."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
)
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
)

_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22


def dtype_tag(dtype: torch.dtype) -> str:
    """The safetensors tag of ``dtype``.

    Raises:
        KeyError: no format here stores that dtype.
    """
    return next(tag for tag, known in DTYPES.items() if known == dtype)


def chunk_elements(device: torch.device) -> int:
    """Elements decoded at once: on a CPU what stays in the L2 cache, elsewhere what fills the
    device while its temporaries stay small beside a weight."""
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def row_slices(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover ``rows``, each of about `chunk_elements` elements, at least one row."""
    step = max(1, chunk_elements(device) // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def chunk_rows(rows: int, columns: int, device: torch.device) -> int:
    """Rows of the largest slice of `row_slices`."""
    return min(rows, max(1, chunk_elements(device) // max(1, columns)))


def row_amax(weight: Tensor, name: str) -> Tensor:
    """Largest magnitude of each row: fp32, ``(rows, 1)``.

    Raises:
        CheckpointError: a row holds NaN or Inf; names the weight and the first such row.
    """
    amax: Tensor = torch.linalg.vector_norm(
        weight, math.inf, dim=-1, keepdim=True, dtype=torch.float32
    )
    bad = ~torch.isfinite(amax)
    if bool(bad.any()):
        rows = bad.flatten().nonzero().flatten().tolist()
        raise CheckpointError(
            f"{name} cannot be quantised",
            expected="finite values",
            found=f"NaN or Inf in {len(rows)} rows, the first is row {rows[0]}",
            remedy="The file is damaged or was made by a run that diverged: fetch it again",
        )
    return amax


def output(
    out: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``out`` if given (checked as by `check_contiguous`), else a new tensor.

    Raises:
        ValueError: ``out`` does not fit.
    """
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check_contiguous("out", out, shape, dtype)
    return out


def check_contiguous(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError unless ``tensor`` is contiguous, of ``shape`` and ``dtype``."""
    found = (tuple(tensor.shape), tensor.dtype)
    if found != (tuple(shape), dtype) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {tuple(shape)} {dtype}, got {found[0]} {found[1]}"
        )
