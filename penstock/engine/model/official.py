"""What a model says of requests by itself, as it was released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from penstock.engine.model.grid import Grid
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import Noise


class Official(Protocol):
    """What a model was released with, where neither a request nor the model's folder says more."""

    @property
    def grid(self) -> Grid:
        """The sizes that it can represent."""

    @property
    def request_defaults(self) -> Mapping[str, Any]:
        """Width, height, steps and guidance_scale."""

    def timesteps(self, shape: VideoShape, steps: int, noise: Noise) -> tuple[float, ...]:
        """Return what the transformer is told at each step of a job."""

    def flow_shift(self, width: int, height: int, asked: float | None) -> float:
        """Return ``asked``, or the official flow shift of a video of that size."""
