"""Denoising: the scheduler of the model, its noise, guidance, and its state as plain values.

The solvers are diffusers' own, or the same ones without what else diffusers imports
(`penstock.engine.run.solvers`); a `Sampler` sets them up as Wan2.1 wants them (flow matching, the
noise levels of `penstock.engine.request.levels`) and can hand out its complete history, so that a
job continues bit-identically.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.request.levels import TRAINED, noise_levels
from penstock.engine.request.levels import timesteps as timesteps_at
from penstock.engine.run.solvers import plain_solver
from penstock.errors import CheckpointError, NonFinite, UsageError
from penstock.profiles.windows import Windows

_SINGULAR: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# What each solver carries from step to step (the attributes of diffusers' schedulers)
_HISTORY = {
    "unipc": ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order"),
    "dpm++": ("model_outputs", "lower_order_nums"),
    "euler": (),
    "lcm": (),
}


@dataclass(frozen=True)
class SamplerState:
    """All that a solver remembers between two steps.

    Attributes:
        values: plain, JSON-ready settings and counters; the next step is ``values["next_step"]``.
        tensors: the history, by name; an absent entry of a list is an unused slot.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Sampler:
    """One run of a solver over ``steps`` steps.

    Args:
        config: the model folder's scheduler config, decoded.
        sampler: ``"unipc"``, ``"dpm++"``, ``"euler"``, or ``"lcm"``: from the predicted end back to
            the next noise level with fresh noise.
        steps: number of steps.
        shift: flow shift, in the place of the config's own (the converted 720p model says 3.0
            where 5.0 is right).
        device: where latents and predictions are.
        distilled: noise levels in equal steps from 1, before the shift (``"euler"``, ``"lcm"``).
        seed: of the noise that ``"lcm"`` adds.

    Raises:
        CheckpointError: the config counts other timesteps than Wan was trained at.
        UsageError: no such sampler.

    Attributes:
        name: of the solver.
        timesteps: ``(steps,)``, what the transformer is given at each step.
        next_step: number of steps done.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        sampler: str,
        steps: int,
        shift: float,
        device: torch.device | str = "cpu",
        distilled: bool = False,
        seed: int = 0,
    ) -> None:
        self._settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "shift": float(shift)}
        self._settings |= {"distilled": distilled} | ({"seed": seed} if sampler == "lcm" else {})
        self.name, self._seed = sampler, seed
        self._history = _HISTORY.get(sampler, ())
        with _refusals():
            self._scheduler = _make_scheduler(config, sampler, float(shift), steps, device)
        levels = noise_levels(sampler, steps, float(shift), distilled=distilled)
        _set_levels(self._scheduler, levels, sampler)
        self.timesteps: Tensor = self._scheduler.timesteps
        self.next_step = 0

    def step(self, noise_pred: Tensor, i: int, latents: Tensor) -> Tensor:
        """Return the latents after step ``i``, of the shape and type of ``latents``.

        Args:
            noise_pred: the (guided) prediction.
            i: the step's number, from 0; each once and in order.
            latents: as given to the transformer, fp32.

        Raises:
            NonFinite: NaN or Inf came out; the sampler is spent.
            UsageError: the step is out of order.
            CheckpointError: the scheduler's config cannot be followed.
        """
        if i != self.next_step or i >= len(self.timesteps):
            raise UsageError(
                "sampler steps must be taken once and in order",
                expected=f"step {self.next_step} of {len(self.timesteps)}",
                found=f"step {i}",
            )
        if self.name in ("euler", "lcm"):
            noise_pred = noise_pred.to(latents.dtype)  # the scheduler rounds latents to its type
        if self.name == "lcm":
            stepped = self._renoised(noise_pred, i, latents)
        else:
            with _refusals():
                (stepped,) = self._scheduler.step(
                    noise_pred, self.timesteps[i], latents, return_dict=False
                )
        self.next_step += 1
        check_finite(stepped, i, len(self.timesteps))
        return stepped

    def _renoised(self, noise_pred: Tensor, i: int, latents: Tensor) -> Tensor:
        """From the predicted end back to the next noise level, as diffusers' stochastic Euler step.

        Its own draws from torch's state before diffusers 0.37, whatever generator it is given.
        """
        sigma, following = self._scheduler.sigmas[i], self._scheduler.sigmas[i + 1]
        noise = torch.randn(
            latents.shape, generator=step_generator(self._seed, i), dtype=torch.float32
        )
        end = latents.to(torch.float32) - sigma * noise_pred
        renoised: Tensor = (1.0 - following) * end + following * noise.to(latents.device)
        return renoised.to(latents.dtype)

    def sigma(self, i: int) -> float:
        """Return the share of noise in the latents before step ``i``, 0 to 1."""
        return float(self._scheduler.sigmas[i])

    def state(self) -> SamplerState:
        """Return the solver's history. The tensors are its own: save them before the next step."""
        values: dict[str, Any] = self._settings | {"next_step": self.next_step}
        tensors: dict[str, Tensor] = {}
        for name in self._history:
            entry = getattr(self._scheduler, name, None)
            slots = entry if isinstance(entry, list) else [entry]
            if all(slot is None or isinstance(slot, Tensor) for slot in slots):
                tensors |= {f"{name}.{k}": t for k, t in enumerate(slots) if t is not None}
            else:
                values[name] = entry
        return SamplerState(values, tensors)

    def close(self) -> None:
        """Let go of the history: diffusers' schedulers lie in reference cycles, and latents on the
        device would wait for the garbage collector."""
        for name in self._history:
            setattr(self._scheduler, name, None)

    def load_state(self, state: SamplerState) -> None:
        """Continue where ``state`` was taken; call on a fresh sampler of the same settings.

        Raises:
            UsageError: the state belongs to another sampler, step count or shift.
        """
        found = {name: state.values.get(name, False) for name in self._settings}
        if found != self._settings:
            raise UsageError(
                "the saved sampler state belongs to other settings",
                expected=str(self._settings),
                found=str(found),
                remedy="Continue with the settings the job was started with",
            )
        self.next_step = int(state.values["next_step"])
        for name in self._history:
            self._restore(name, state)
        if self.next_step:
            self._scheduler._step_index = self.next_step

    def _restore(self, name: str, state: SamplerState) -> None:
        slots = getattr(self._scheduler, name, None)
        if name in state.values:
            setattr(self._scheduler, name, state.values[name])
        elif isinstance(slots, list):
            restored = [state.tensors.get(f"{name}.{k}") for k in range(len(slots))]
            setattr(self._scheduler, name, restored)
        else:
            setattr(self._scheduler, name, state.tensors.get(f"{name}.0"))


@contextmanager
def _refusals() -> Iterator[None]:
    """Name what diffusers' solvers refuse of a config, each entry of which may be sound by
    itself."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, _SINGULAR) as error:
        raise CheckpointError(
            "the model's scheduler config cannot be used",
            expected="entries that one solver can follow together",
            found=" ".join(str(error).split())[:200],
            remedy="Correct scheduler/scheduler_config.json, or choose another --sampler",
        ) from error


_BEFORE_STEPS = -1
"""In the place of a step: what is drawn before the first."""


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return Gaussian fp32 noise from torch's CPU generator, as diffusers draws it with one.

    A function of the seed on one machine; across machines only the tensor itself is sure.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def long_noise(first: Tensor, frames: int, windows: Windows, seed: int) -> Tensor:
    """Return the noise of a long video from that of a window: repeated, so that all windows begin
    alike, and shuffled among neighbours, so that they do not all show the same.

    Source: "FreeNoise", arXiv:2310.15169, section 3.2.

    Args:
        first: (1, z, t, h, w), of a window.
        frames: latent frames of the video.
        windows: in latent frames; as many as two of them do not have in common are shuffled.
        seed: of the job.
    """
    draw, stride = step_generator(seed, _BEFORE_STEPS), windows.length - windows.overlap
    places = list(range(first.shape[2]))
    while len(places) < frames:
        group = places[-windows.length :][:stride]
        places += [group[at] for at in torch.randperm(stride, generator=draw).tolist()]
    return first[:, :, places[:frames]]


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return what draws the noise that is added after ``step``: a function of both, so that a job
    that is resumed draws the same, and independent of the first noise and of other steps'."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance, ``uncond + scale * (cond - uncond)``, into ``conditional``.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598. Rounded as
    diffusers' expression is, operation by operation.
    """
    return conditional.sub_(unconditional).mul_(scale).add_(unconditional)


def check_finite(latents: Tensor, i: int, steps: int) -> None:
    """Stop at NaN or Inf.

    Raises:
        NonFinite: names the step (counted from 1) and how many values are bad.
    """
    bad = latents.numel() - int(latents.isfinite().sum())
    if bad:
        raise NonFinite(
            f"NaN or Inf in the latents after step {i + 1} of {steps}",
            expected="finite values",
            found=f"{bad:,} of {latents.numel():,} bad",
            remedy="Try another weight format (fp16 can overflow), or check the model's files",
        )


def _set_levels(scheduler: Any, levels: tuple[float, ...], sampler: str) -> None:
    """Put ``levels`` in the place of the scheduler's own, each where it keeps them and as it types
    them: no version of ``set_timesteps`` takes levels for all solvers."""
    sigmas, told = scheduler.sigmas, scheduler.timesteps
    scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float32, device=sigmas.device)
    given = timesteps_at(levels, sampler)
    scheduler.timesteps = torch.tensor(given, dtype=told.dtype, device=told.device)


def _make_scheduler(
    config: dict[str, Any], sampler: str, shift: float, steps: int, device: torch.device | str
) -> Any:
    """Make the solver with room for ``steps`` steps; their levels are still to be set."""
    trained = config.get("num_train_timesteps", TRAINED)
    if trained != TRAINED:
        raise CheckpointError(
            "the scheduler's config is of another model",
            expected=f"num_train_timesteps {TRAINED}",
            found=str(trained),
            remedy="Copy scheduler_config.json from a Wan model",
        )
    if sampler not in _HISTORY:
        raise UsageError("unknown sampler", expected=" or ".join(_HISTORY), found=repr(sampler))
    plain = plain_solver(config, sampler, steps, device)
    if plain is not None:
        return plain
    scheduler = _of_diffusers(config, sampler, shift)
    scheduler.set_timesteps(steps, device=device)
    # By count, never by looking a timestep up: rounded ones can repeat
    scheduler.set_begin_index(0)
    return scheduler


def _of_diffusers(config: dict[str, Any], sampler: str, shift: float) -> Any:
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    static = {"use_dynamic_shifting": False}
    if sampler == "unipc":
        return UniPCMultistepScheduler.from_config(config, **_FLOW, **static, flow_shift=shift)
    if sampler == "dpm++":
        return DPMSolverMultistepScheduler.from_config(
            config, **_FLOW, **static, flow_shift=shift, algorithm_type="dpmsolver++"
        )
    return FlowMatchEulerDiscreteScheduler.from_config(
        config, **static, shift=shift, stochastic_sampling=sampler == "lcm"
    )
