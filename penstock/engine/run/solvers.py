"""The solvers that Wan's jobs use, where a scheduler's config asks for nothing else.

They are diffusers' ``UniPCMultistepScheduler`` and ``FlowMatchEulerDiscreteScheduler`` for flow
matching, rounded operation by operation as these are (tests compare bits); importing diffusers'
own takes two seconds and scipy. A config that asks for more is left to diffusers.

A solver stands at the noise levels ``sigmas``, one more than there are steps, and remembers what
its method needs under the names that diffusers' has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

_TWO = "unipc", "euler", "lcm"
_SPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_PLAIN: Mapping[str, Any] = MappingProxyType({
    "trained_betas": None, "beta_schedule": "linear", "rescale_betas_zero_snr": False,
    "thresholding": False, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True,
    "disable_corrector": [], "solver_p": None, "shift_terminal": None, "invert_sigmas": False,
    "time_shift_type": "exponential",
})  # fmt: skip
"""What a config may say of the method without asking for another one. Where noise levels lie is
none of its business: they are given."""


class _Stepped:
    """Counts steps as diffusers' schedulers do."""

    _step_index = 0

    @property
    def step_index(self) -> int:
        """The step that comes next, from 0."""
        return self._step_index


class UniPC(_Stepped):
    """UniPC in its B2(h) form, predicting the clean latents of a flow.

    Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
    Diffusion Models", arXiv:2302.04867.

    Args:
        order: of the method: how many predictions it looks at.
        steps: number of steps.
        device: of the timesteps.
    """

    def __init__(self, order: int, steps: int, device: torch.device | str) -> None:
        self.sigmas = torch.empty(steps + 1)
        self.timesteps = torch.empty(steps, dtype=torch.int64, device=device)
        self.model_outputs: list[Tensor | None] = [None] * order
        self.timestep_list: list[Tensor | None] = [None] * order
        self.last_sample: Tensor | None = None
        self.lower_order_nums = 0
        self.this_order = 0
        self._order = order

    def step(
        self, noise_pred: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return the latents after the next step, as diffusers' schedulers return them."""
        at = self._step_index
        clean = latents - self.sigmas[at] * noise_pred
        # Correct first, with the prediction that has just come, by the order of the step that is
        # corrected; then predict. The other way round would correct with what it predicts.
        if at > 0 and self.last_sample is not None:
            latents = self._moved(self.last_sample, at - 1, self.this_order, clean)
        self.model_outputs = [*self.model_outputs[1:], clean]
        self.timestep_list = [*self.timestep_list[1:], timestep]
        # Lower order at both ends: too few predictions at the beginning, no room for error at the
        # end, where the last level is zero and half log-SNR infinite.
        left = len(self.timesteps) - at
        self.this_order = min(self._order, left, self.lower_order_nums + 1)
        self.last_sample = latents
        moved = self._moved(latents, at, self.this_order, None)
        self.lower_order_nums = min(self.lower_order_nums + 1, self._order)
        self._step_index = at + 1
        return (moved,)

    def _moved(self, x: Tensor, at: int, order: int, there: Tensor | None) -> Tensor:
        """Return ``x`` from level ``at`` to the next.

        Args:
            x: the latents at that level.
            at: its index.
            order: predictions that are looked at.
            there: the clean latents as predicted at the next level, which correct; None: predict.
        """
        newest = self.model_outputs[-1]
        assert newest is not None
        (alpha, sigma, log_snr), (_, sigma_here, log_snr_here) = (
            self._level(at + 1, x.device), self._level(at, x.device)
        )  # fmt: skip
        h = log_snr - log_snr_here
        ratios, slopes = [], []
        for back in range(1, order):
            earlier = self.model_outputs[-1 - back]
            assert earlier is not None
            ratio = (self._level(at - back, x.device)[2] - log_snr_here) / h
            ratios.append(ratio)
            slopes.append((earlier - newest) / ratio)
        growth = torch.expm1(-h)
        moved = sigma / sigma_here * x - alpha * growth * newest
        weights = _weights(
            torch.stack([*ratios, torch.ones((), device=x.device)]), h, there is None
        )
        weights = weights.to(x.dtype)
        change: Tensor | int = 0
        if slopes:
            stacked = torch.stack(slopes, dim=1)
            change = torch.einsum("k,bkc...->bc...", weights[: len(slopes)], stacked)
        if there is not None:
            change = change + weights[-1] * (there - newest)
        return (moved - alpha * growth * change).to(x.dtype)

    def _level(self, index: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the signal, noise and half the logarithm of their ratio squared at a level."""
        sigma = self.sigmas[index].to(device)
        alpha = 1 - sigma
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)


def _weights(ratios: Tensor, h: Tensor, predicts: bool) -> Tensor:
    """Return the weights of the differences between predictions: those that fit the exponential
    integrator's terms.

    Args:
        ratios: places of the predictions in the step, the last one 1.
        h: the step in half log-SNR.
        predicts: the last place is not known yet. Up to order 2 (1, where it is known) the
            published method takes a half.
    """
    order = len(ratios)
    if order == (2 if predicts else 1):
        return torch.full((1,), 0.5, device=ratios.device)
    if order == 1:
        return ratios[:0]
    growth = torch.expm1(-h)
    term = growth / -h - 1
    factorial, rows, terms = 1, [], []
    for power in range(order):
        rows.append(torch.pow(ratios, power))
        terms.append(term * factorial / growth)
        factorial *= power + 2
        term = term / -h - 1 / factorial
    known = order - 1 if predicts else order
    matrix, right = torch.stack(rows), torch.stack(terms)
    solved: Tensor = torch.linalg.solve(matrix[:known, :known], right[:known])
    return solved


class Euler(_Stepped):
    """Euler's method along the flow.

    Args:
        steps: number of steps.
        device: of levels and timesteps.
    """

    def __init__(self, steps: int, device: torch.device | str) -> None:
        self.sigmas = torch.empty(steps + 1, device=device)
        self.timesteps = torch.empty(steps, device=device)

    def step(
        self, noise_pred: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return the latents after the next step, as diffusers' schedulers return them."""
        at = self._step_index
        moved = latents.to(torch.float32) + (self.sigmas[at + 1] - self.sigmas[at]) * noise_pred
        self._step_index = at + 1
        return (moved.to(noise_pred.dtype),)


def plain_solver(
    config: Mapping[str, Any], sampler: str, steps: int, device: torch.device | str
) -> UniPC | Euler | None:
    """Return the solver for ``config``, its levels still to be set; None: the config asks for
    more."""
    plain = all(config.get(name, value) == value for name, value in _PLAIN.items())
    if not plain or any(config.get(name) for name in _SPACING) or sampler not in _TWO:
        return None
    if sampler == "unipc":
        return UniPC(config.get("solver_order", 2), steps, device)
    return Euler(steps, device)
