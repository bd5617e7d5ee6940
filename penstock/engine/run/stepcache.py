"""Steps whose forward pass is left out: what takes its place, and which steps they are.

At a skipped step the guided velocity is taken from a line through the last two that were computed.
The last step is always computed: most of the error of published caches lies there. `Budget` decides
as it goes, from how wrong the line was so far; `Planned` follows a schedule of exactly so many
forwards. All that a cache knows is in its `state`, so that a job which is resumed skips the same
steps, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.engine.run.sampler import Sampler, SamplerState
from penstock.engine.run.stepplan import Schedule, line
from penstock.profiles.caching import MOST_SKIPPED, SURE, WARM

FIRST_SPAN = 0.03
"""The difference in noise over which a velocity is taken to change by its slope, before a line has
shown how it bends."""

FAR_DAMPING = 0.75
"""What a budget takes of the slope at the second skipped step in a row and later: a line that is
drawn on and on overshoots."""


SAMPLE = 1024
"""Values of each velocity that a record is made from."""

_NAME = "cache"
"""Of what a cache knows, among the values and the tensors of a solver's state."""


class Rule(Protocol):
    """Which steps are computed, by what is known when their turn comes."""

    def wants(self, step: int) -> bool:
        """Decide whether ``step`` is to be computed; asked once a step, in order."""

    def damping(self, since: int) -> float:
        """Return what is taken of the slope, ``since`` steps after the last computed one."""

    def learns(self, step: int, error: float | None, size: float) -> None:
        """``step`` was computed.

        Args:
            error: norm of what the line had foretold wrongly; None: there was no line.
            size: norm of the latents.
        """

    def reset(self) -> None:
        """Forget what was computed: what comes next is the first of another model."""

    def left(self, step: int) -> tuple[int, int]:
        """Return forwards from ``step`` on: that are sure to come, and the most."""

    @property
    def values(self) -> dict[str, Any]:
        """All that it knows, plain and JSON-ready."""

    def load(self, values: dict[str, Any]) -> None:
        """Go on from ``values``."""


class StepCache:
    """Stands between the transformer and the sampler.

    Every step in order: `wants`, then `computed` with what the transformer gave, or `predicted`.

    Args:
        steps: that one transformer computes.
        rule: which of them are computed; None: all are, and nothing is kept.
        recording: keep a sample of each velocity, for `Recorded`.

    Attributes:
        steps: as given.
        computed_steps: of the whole job, so far.
        samples: of each of them, where they are recorded.
    """

    def __init__(self, steps: range, rule: Rule | None = None, *, recording: bool = False) -> None:
        self.steps, self._rule, self._recording = steps, rule, recording
        self._kept: list[Tensor] = []
        self._at: list[int] = []
        self.computed_steps = list(range(steps.start))
        self.samples: list[Tensor] = []

    def wants(self, step: int) -> bool:
        """Decide whether ``step`` is to be computed; asked once a step, in order."""
        return self._rule is None or not self._kept or self._rule.wants(step)

    def left(self, step: int) -> tuple[int, int]:
        """Return forwards from ``step`` on: that are sure to come, and the most."""
        most = self.steps.stop - step
        return (most, most) if self._rule is None else self._rule.left(step)

    def computed(self, step: int, velocity: Tensor, latents: Tensor) -> None:
        """Learn from a step.

        Args:
            velocity: guided, as the sampler gets it.
            latents: as the transformer got them.
        """
        self.computed_steps.append(step)
        if self._recording:
            self.samples.append(sample(velocity))
        if self._rule is None:
            return
        # A copy: in fp32 a solver may keep and change what it is given
        velocity = velocity.to(torch.float32, copy=True)
        error = None
        if self._kept:
            # What a skip would have cost here, while the truth is at hand; the bend that later
            # skips are judged by comes from it. Computed before the new point joins the line.
            error = float(self._line(step, 1.0).sub_(velocity).norm())
        self._rule.learns(step, error, float(latents.norm()))
        self._kept, self._at = [*self._kept[-1:], velocity], [*self._at[-1:], step]

    def predicted(self, step: int) -> Tensor:
        """Return the velocity of a step that is skipped, fp32."""
        assert self._rule is not None
        return self._line(step, self._rule.damping(step - self._at[-1]))

    def _line(self, step: int, damping: float) -> Tensor:
        """Return the velocity on the line; with one velocity so far, that one."""
        last = self._kept[-1]
        if len(self._kept) < 2:
            return last.clone()
        slope = line(self._at[1], self._at[0], step, damping)
        return torch.sub(last, self._kept[0]).mul_(slope).add_(last)

    def reset(self) -> None:
        """Forget what was computed: another model, or another window, comes."""
        self._kept, self._at = [], []
        if self._rule is not None:
            self._rule.reset()

    def state(self) -> SamplerState:
        """Return all that is known, beside a solver's history. The tensors are its own."""
        if self._rule is None and self.computed_steps == list(range(len(self.computed_steps))):
            return SamplerState({}, {})
        values = {
            "of": [self.steps.start, self.steps.stop],
            "steps": list(self.computed_steps),
            "at": list(self._at),
            "rule": None if self._rule is None else self._rule.values,
        }
        tensors = {f"{_NAME}.{index}": tensor for index, tensor in enumerate(self._kept)}
        return SamplerState({_NAME: values}, tensors)

    def load_state(self, state: SamplerState) -> None:
        """Go on where ``state`` was taken: of a cache of these steps, from all that it knew; of one
        before, from nothing, as another transformer comes."""
        values = state.values.get(_NAME, {})
        self.computed_steps = list(values.get("steps", range(state.values["next_step"])))
        if self._rule is None or not is_of(state, self.steps):
            return
        self._at = list(values["at"])
        self._kept = [state.tensors[f"{_NAME}.{index}"] for index in range(len(self._at))]
        self._rule.load(values["rule"])


def is_of(state: SamplerState, steps: range) -> bool:
    """Return whether ``state`` holds what a cache of these ``steps`` knows."""
    values = state.values.get(_NAME)
    return values is not None and values["of"] == [steps.start, steps.stop]


class Planned:
    """Exactly the steps of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._damping = 0.0

    def wants(self, step: int) -> bool:
        """As `Rule`."""
        return step in self._schedule.computed

    def damping(self, since: int) -> float:
        """As `Rule`."""
        return self._damping

    def learns(self, step: int, error: float | None, size: float) -> None:
        """As `Rule`."""
        self._damping = self._schedule.damping[self._schedule.computed.index(step)]

    def reset(self) -> None:
        """As `Rule`: the schedule stands."""

    def left(self, step: int) -> tuple[int, int]:
        """As `Rule`."""
        left = sum(step <= at for at in self._schedule.computed)
        return left, left

    @property
    def values(self) -> dict[str, Any]:
        """As `Rule`."""
        schedule = self._schedule
        return {
            "computed": list(schedule.computed),
            "damping": list(schedule.damping),
            "now": self._damping,
        }

    def load(self, values: dict[str, Any]) -> None:
        """As `Rule`."""
        self._schedule = Schedule(tuple(values["computed"]), tuple(values["damping"]))
        self._damping = values["now"]


class Budget:
    """Skips while the error that is to be expected stays below a share of the latents.

    How far the velocity bends is known from how wrong the line was at the last computed step; the
    error of a line grows with the product of the distances in noise from its two points. What is
    expected of each skipped step is weighed by how much of it is left at the end.

    Args:
        budget: what skipped steps in a row may add up to.
        levels: noise before each step of the job.
        left: of an error in each step's velocity, at the end of the job.
        last: the last step of the transformer; None: of the job.
    """

    def __init__(
        self,
        budget: float,
        levels: Sequence[float],
        left: Sequence[float],
        last: int | None = None,
    ) -> None:
        self._budget, self._levels = budget, tuple(levels)
        self._last = len(levels) - 1 if last is None else last
        self._left_of_errors = tuple(left)
        self.reset()

    def reset(self) -> None:
        """As `Rule`."""
        self._at: list[int] = []
        self._bend = self._size = self._spent = 0.0

    def wants(self, step: int) -> bool:
        """As `Rule`."""
        if len(self._at) < WARM or step == self._last:
            return True
        if step - self._at[-1] > MOST_SKIPPED or not self._size:
            return True
        self._spent += self._left_of_errors[step] * self._bend * self._far(step) / self._size
        return self._spent >= self._budget

    def damping(self, since: int) -> float:
        """As `Rule`."""
        return 1.0 if since == 1 else FAR_DAMPING

    def learns(self, step: int, error: float | None, size: float) -> None:
        """As `Rule`."""
        if error is not None:
            self._bend = error / self._far(step)
        self._at, self._size, self._spent = [*self._at[-1:], step], size, 0.0

    def left(self, step: int) -> tuple[int, int]:
        """As `Rule`: the last one is sure, and one before it while there is no line yet."""
        most = self._last + 1 - step
        return min(most, 1 if len(self._at) == WARM else SURE), most

    def _far(self, step: int) -> float:
        """Return the product of the distances in noise from the points of the line to ``step``."""
        levels = self._levels
        *before, last = (levels[at] - levels[step] for at in self._at)
        return last * (before[0] if before else FIRST_SPAN)

    @property
    def values(self) -> dict[str, Any]:
        """As `Rule`."""
        return {"at": list(self._at), "bend": self._bend, "size": self._size, "spent": self._spent}

    def load(self, values: dict[str, Any]) -> None:
        """As `Rule`."""
        self._at, self._bend = list(values["at"]), values["bend"]
        self._size, self._spent = values["size"], values["spent"]


def sample(velocity: Tensor) -> Tensor:
    """Return some of its values, always from the same places, fp32 on the CPU."""
    flat = velocity.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].to("cpu", torch.float32, copy=True)


def shares_of(sampler: Sampler) -> tuple[float, ...]:
    """Return how much each step's velocity counts in the result, in which solvers are linear.

    One that adds noise counts as Euler's method.

    Args:
        sampler: a fresh one on the CPU, which is spent by it.
    """
    steps = len(sampler.timesteps)
    levels = [*(sampler.sigma(step) for step in range(steps)), 0.0]
    if sampler.name == "lcm":
        return tuple(one - other for one, other in zip(levels, levels[1:], strict=False))
    latents = torch.zeros(steps, 1, 1, 1, 1, dtype=torch.float64)
    for step in range(steps):
        velocity = torch.zeros_like(latents)
        velocity[step] = 1.0
        latents = sampler.step(velocity, step, latents)
    return tuple(-latents.flatten().tolist()[step] for step in range(steps))
