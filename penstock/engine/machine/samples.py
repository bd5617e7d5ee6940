"""What a family lets `penstock.engine.machine.calibrate` measure of its own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class ForwardPass(Protocol):
    """A block of a lean forward on random weights: called with the tokens of a chunk."""

    @property
    def width(self) -> int:
        """Of the hidden states."""

    @property
    def tokens(self) -> int:
        """Of one pass."""

    @property
    def attended(self) -> int:
        """Tokens that each of them attends to, in self- and cross-attention."""

    def flops(self) -> Any:
        """Return the arithmetic of a pass: ``linear``, ``self_attention`` and
        ``cross_attention``."""

    def __call__(self, chunk_tokens: int) -> object:
        """Run the pass."""


@dataclass(frozen=True)
class Samples:
    """A family's operations on random weights.

    Attributes:
        forward: from device, dtype and about so many tokens.
        residual: a residual block of the VAE on the next frame, from channels, side of the frame,
            device and dtype: its work (``flops``, ``elements``, ``pixels``, ``calls``), and how to
            let it run.
    """

    forward: Callable[[torch.device, torch.dtype, int], ForwardPass]
    residual: Callable[[int, int, torch.device, torch.dtype], tuple[Any, Callable[[], object]]]


class SampledFamily(Protocol):
    """What a family's module ``family`` offers to this room, beside `Family`."""

    def samples(self) -> Samples:
        """Return its operations."""
