"""What planning and streaming agree on about blocks of weights: how they lie, and which stay."""

from __future__ import annotations

from penstock.errors import UsageError
from penstock.units import MIB

TENSOR_ALIGNMENT = 64
"""As torch's own CPU allocator places tensors: kernels take the same path, with the same bits."""

PAGE_BYTES = 4096
"""Blocks begin on pages and are whole pages: direct reads want offsets, addresses and lengths in
multiples of this (it covers the logical block size of every disk that open(2) speaks of)."""

STAGING_BYTES = 64 * MIB
"""The most host memory through which weights that stay on the device are read."""


def spread(n: int, k: int) -> tuple[int, ...]:
    """Return ``k`` of the places ``0..n-1``, ascending, with gaps that differ by at most one.

    Raises:
        UsageError: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise UsageError(
            "illegal residency: spread",
            expected=f"0 to {n} places",
            found=str(k),
            remedy="Let the planner choose, or correct the numbers.",
        )
    return tuple((2 * i + 1) * n // (2 * k) for i in range(k))
