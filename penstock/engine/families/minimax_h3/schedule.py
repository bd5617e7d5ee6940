"""The two schedules of a job: the video's and the sound's, each with its own shift.

Source: diffusers' ``MiniMaxH3Scheduler``, whose figures are fp32 and are kept so: N levels of noise
from 1 to 0 are N - 1 steps, a timestep is one minus its level, and what the transformer gives leads
towards the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=8)
def told(steps: int, shift: float) -> tuple[float, ...]:
    """Return the timesteps of so many levels of noise, without torch: as `Schedule` has them, but
    for the last bits."""
    found = []
    for index in range(max(steps - 1, 0)):
        base = 1.0 - index / (steps - 1)
        found.append(1.0 - shift * base / (1 + (shift - 1) * base))
    return tuple(found)


@dataclass(frozen=True)
class Schedule:
    """One schedule.

    Attributes:
        sigmas: levels of noise, from 1 to 0, (steps + 1,), fp32 on the CPU.
    """

    sigmas: Tensor

    @classmethod
    def of(cls, levels: int, shift: float) -> Schedule:
        """Make it of so many levels, the last of which is none."""
        import torch

        base = torch.linspace(1.0, 0.0, levels, dtype=torch.float32)
        sigmas = shift * base / (1 + (shift - 1) * base)
        return cls(torch.unique_consecutive(sigmas))

    @property
    def timesteps(self) -> Tensor:
        """Of each step, (steps,), fp32: 1 is clean."""
        return 1.0 - self.sigmas[:-1]

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """Return the latents after the step ``index``.

        Args:
            latents: fp32.
            velocity: towards noise, fp32.
        """
        # The level twice: from the timestep and from the grid, as the makers have it
        left = 1 - self.timesteps[index]
        ended = latents - left.to(latents.device) * velocity
        ratio = (self.sigmas[index + 1] / self.sigmas[index]).to(latents.device)
        return ratio * latents + (1.0 - ratio) * ended
