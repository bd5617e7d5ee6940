"""Where the sampling stands: the last finished step, which a failure leaves as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from penstock.engine.run.keeper import Point
from penstock.engine.run.sampler import Sampler, SamplerState, initial_noise, long_noise
from penstock.engine.run.stage import Stage
from penstock.engine.run.steering import steer
from penstock.engine.run.stepcache import StepCache
from penstock.engine.run.steprecord import cache_for, records_there, same_records
from penstock.profiles.caching import Caching


class Sampling:
    """The point that a job's sampling has reached: the one that was kept, or the first noise.

    Args:
        stage: the running job.

    Raises:
        JournalError: a state was kept, and both its generations are damaged.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        with stage.restoring():
            kept = stage.keeper.point()
            self._point = self._first() if kept is None else _moved(kept, stage.device)

    def _first(self) -> Point:
        request = self._stage.job.request
        assert request.seed is not None
        state = _joined(self._sampler().state(), records_there(self._stage))
        point = Point(self._noise(request.seed).to(self._stage.device), state)
        self._stage.keeper.save_point(point)
        self._stage.keeper.settle()  # the copy's room is the denoising's, which has not begun
        return point

    def _noise(self, seed: int) -> Tensor:
        request, model = self._stage.job.request, self._stage.model
        shape = model.latent_shape(request.video_shape)
        if request.windows is None:
            return initial_noise(shape, seed)
        windows = request.windows.latent(request.grid.temporal)
        first = initial_noise((*shape[:2], windows.length, *shape[3:]), seed)
        return long_noise(first, shape[2], windows, seed)

    def _sampler(self, device: str | None = None) -> Sampler:
        request = self._stage.job.request
        assert request.seed is not None
        return Sampler(
            dict(self._stage.model.source.scheduler),
            sampler=request.sampler,
            steps=request.steps,
            shift=self._stage.model.flow_shift(request.width, request.height, request.shift),
            device=device or self._stage.device,
            distilled=request.distilled,
            seed=request.seed,
        )

    @property
    def latents(self) -> Tensor:
        """(1, z, t, h, w), fp32, on the device."""
        return self._point.latents

    @property
    def steps_done(self) -> int:
        """Steps that are finished."""
        return self._point.step

    def resume(self, steps: range, caching: Caching) -> tuple[Sampler, StepCache]:
        """Return a fresh sampler, and the cache of forward passes, that stand at the point.

        Args:
            steps: that one transformer computes.
            caching: of its forward passes.
        """
        sampler = self._sampler()
        sampler.load_state(self._point.solver)
        fresh = partial(self._sampler, "cpu")
        return sampler, cache_for(self._stage, steps, caching, fresh, self._point.solver)

    def step(
        self, sampler: Sampler, cache: StepCache, prediction: Tensor, latents: Tensor
    ) -> Tensor:
        """Take one step of ``sampler``, and return the new latents, as ``on_step`` has left them.

        The step before is on the disk first, so that at most one finished step can be lost.
        """
        self._stage.keeper.settle()
        latents = self._steered(sampler, sampler.step(prediction, sampler.next_step, latents))
        known = _joined(cache.state(), same_records(self._point.solver))
        self._point = Point(latents, _joined(sampler.state(), known))
        self._stage.keeper.save_point(self._point)
        return latents

    def _steered(self, sampler: Sampler, latents: Tensor) -> Tensor:
        stage, on_step = self._stage, self._stage.job.hooks.on_step
        if on_step is None:
            return latents
        with stage.host_ledger.reserve("on_step: latents", latents.nbytes):
            wanted = steer(on_step, sampler.next_step, stage.job.request.steps, latents)
        if wanted is None:
            return latents
        if not stage.keeper.steered:
            stage.keeper.save_steered()  # before any state that it has touched
        return wanted


def _joined(solver: SamplerState, cache: SamplerState) -> SamplerState:
    return SamplerState(solver.values | cache.values, solver.tensors | cache.tensors)


def _moved(point: Point, device: torch.device) -> Point:
    tensors = {name: tensor.to(device) for name, tensor in point.solver.tensors.items()}
    return replace(
        point,
        latents=point.latents.to(device),
        solver=SamplerState(point.solver.values, tensors),
    )
