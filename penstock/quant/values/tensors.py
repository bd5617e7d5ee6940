"""What every format's arithmetic needs: dtypes, refusing NaN and Inf, outputs that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.formats.tags import TORCH_NAMES

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {tag: getattr(torch, name) for tag, name in TORCH_NAMES.items()}
)


def dtype_tag(dtype: torch.dtype) -> str:
    """Return the safetensors tag of ``dtype``.

    Raises:
        KeyError: no format here stores that dtype.
    """
    return next(tag for tag, known in DTYPES.items() if known == dtype)


def row_amax(weight: Tensor, name: str) -> Tensor:
    """Return the largest magnitude of each row: fp32, ``(rows, 1)``.

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
    """Return ``out`` if given (checked as by `check_contiguous`), else a new tensor.

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
