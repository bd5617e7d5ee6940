"""What a job's user sees and does between steps: previews, and latents that may be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from penstock.engine.run.sampler import check_finite
from penstock.errors import UsageError, brief

OnStep: TypeAlias = Callable[[int, Tensor], Tensor | None]
"""Called with the number of steps done (from 1) and a copy of the latents, fp32 (1, z, t, h, w) on
the CPU; returns None, or latents of that shape to go on with."""


@dataclass(frozen=True)
class Hooks:
    """What a job is asked to do between steps.

    Attributes:
        on_step: called after each step.
        preview_every: a preview every so many steps; None: never.

    Raises:
        UsageError: ``on_step`` cannot be called, or ``preview_every`` is no positive number.
    """

    on_step: OnStep | None = None
    preview_every: int | None = None

    def __post_init__(self) -> None:
        every = self.preview_every
        if every is not None and (type(every) is not int or every < 1):
            raise UsageError(
                "preview_every counts steps",
                expected="1 or more, or None for no previews",
                found=brief(every),
            )
        if self.on_step is not None and not callable(self.on_step):
            raise UsageError(
                "on_step is called after each step",
                expected="a function of a step and latents",
                found=type(self.on_step).__name__,
            )


def steer(on_step: OnStep, step: int, steps: int, latents: Tensor) -> Tensor | None:
    """Return what ``on_step`` wants in the place of ``latents``, on their device; None: it leaves
    them.

    Args:
        on_step: is given a copy, and what it returns is copied: neither side can change the other's
            tensor later.
        step, steps: done, and of all.
        latents: (1, z, t, h, w), fp32.

    Raises:
        UsageError: it returned something that cannot take the latents' place.
        NonFinite: it returned NaN or Inf.
        Exception: whatever it has raised.
    """
    wanted = on_step(step, latents.detach().to("cpu", copy=True))
    if wanted is None:
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != latents.shape or wanted.is_complex():
        raise UsageError(
            f"what on_step returned after step {step} cannot be the latents",
            expected=f"None, or a real tensor of shape {tuple(latents.shape)}",
            found=_described(wanted),
            remedy="Return None to leave the latents as they are.",
        )
    check_finite(wanted, step - 1, steps)
    return wanted.detach().to(latents.device, latents.dtype, copy=True)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
