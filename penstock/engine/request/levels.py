"""Noise levels of a job's steps, and the timesteps the transformer is told: the makers' own.

Computed here, and not asked of the installed diffusers, whose spacing changes from version to
version (0.38 moved UniPC's). Pure and torch-free.

Source of the figures: Wan2.1's ``wan/utils/fm_solvers.py`` and ``fm_solvers_unipc.py``, for UniPC
and DPM++. The makers have no ``euler`` and no ``lcm``: those are spaced as diffusers'
``FlowMatchEulerDiscreteScheduler`` does, or, for a distilled model, in equal steps from 1.
"""

from __future__ import annotations

TRAINED = 1000
"""Timesteps that Wan was trained at (``num_train_timesteps``)."""

RULE = "makers 1"
"""Name of the rule, for fingerprints: another one makes another video of the same request."""

WHOLE = ("unipc", "dpm++")
"""Samplers whose timesteps are whole numbers, cut off."""

_UNIPC_FIRST = 0.9990000128746033
"""1 - 1 / `TRAINED`, as the makers' fp32 holds it: the first level of UniPC before the shift."""


def noise_levels(
    sampler: str, steps: int, shift: float, *, distilled: bool = False
) -> tuple[float, ...]:
    """Return the share of noise before each of ``steps`` steps, falling from at most 1.

    The level after the last step is 0, and not among them.

    Args:
        sampler: one of `penstock.engine.request.generation.SAMPLERS`.
        steps: 1 and above.
        shift: flow shift, above 0.
        distilled: in equal steps from 1 before the shift (``"euler"``, ``"lcm"``).
    """
    first, last, parts = 1.0, 0.0, steps
    if sampler == "unipc":
        first = _UNIPC_FIRST
    elif sampler != "dpm++" and not distilled:
        # diffusers ends one step above nothing, and shifts that end twice
        last, parts = _shifted(1 / TRAINED, shift), max(steps - 1, 1)
    stride = (last - first) / parts
    return tuple(_shifted(first + step * stride, shift) for step in range(steps))


def timesteps(levels: tuple[float, ...], sampler: str) -> tuple[float, ...]:
    """Return what the transformer is told at each of these levels, of `TRAINED`."""
    told = (TRAINED * level for level in levels)
    return tuple(map(int, told)) if sampler in WHOLE else tuple(told)


def steps_above(boundary: float, told: tuple[float, ...]) -> int:
    """Return steps whose timesteps are ``boundary`` of `TRAINED`, or more: those of the transformer
    for much noise. Source: Wan2.2's ``wan/text2video.py``."""
    return sum(timestep >= boundary * TRAINED for timestep in told)


def _shifted(level: float, shift: float) -> float:
    return shift * level / (1 + (shift - 1) * level)
