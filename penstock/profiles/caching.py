"""What a step cache is told, and how many forward passes that leaves: a word, and counts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from penstock.errors import ProfileError, brief

OFF, BUDGET, PLAN = "off", "budget", "plan"

DEFAULT_BUDGET = 0.001
"""Of "budget" alone. On the small trained model 0.48 of 40 steps were computed; 0.65 at 0.0003, and
0.39 at 0.002 (`benchmarks.caches`)."""

FEWEST_STEPS = 8
"""With fewer, every step is computed: the first, those a line is drawn through and the last are
nearly all there are, and each changes too much to be foretold."""

WARM = 2
"""Steps at the start that a budget always computes: a line needs two."""

SURE = 2
"""Forwards that are sure to come while the steps are still to be chosen: the next and the last."""

MOST_SKIPPED = 6
"""Steps in a row that are skipped at most: a line is no good for more."""

STATE_TENSORS = 2
"""Of the latents' size, which a cache keeps from step to step."""

_EXPECTED = "off, budget, budget:T (an error above 0, such as 0.001) or plan:N (2 or more forwards)"
_PLAN = re.compile(r"plan:(\d{1,4})", re.ASCII)


@dataclass(frozen=True)
class Caching:
    """Which steps are computed: all, as an error budget allows, or exactly so many.

    Attributes:
        kind: "off", "budget" or "plan".
        budget: of "budget": the error that skipped steps in a row may add up to, as a share of the
            latents.
        planned: of "plan": forwards.
    """

    kind: str = OFF
    budget: float = 0.0
    planned: int = 0

    @classmethod
    def of(cls, word: object) -> Caching:
        """As flags and files spell it.

        Raises:
            ProfileError: no such word.
        """
        kind, _, value = word.partition(":") if isinstance(word, str) else ("", "", "")
        if word == OFF:
            return cls()
        if word == BUDGET:
            return cls(BUDGET, DEFAULT_BUDGET)
        match = _PLAN.fullmatch(word) if kind == PLAN and isinstance(word, str) else None
        if match and int(match[1]) >= 2:
            return cls(PLAN, planned=int(match[1]))
        budget = _number(value) if kind == BUDGET else 0.0
        if not 0 < budget < math.inf:
            raise ProfileError("illegal cache", expected=_EXPECTED, found=brief(word))
        return cls(BUDGET, budget)

    def skips(self, steps: int) -> bool:
        """Return whether any of so many steps can be skipped."""
        return self.kind != OFF and steps >= FEWEST_STEPS and self.forwards(steps)[0] < steps

    def forwards(self, steps: int) -> tuple[int, int]:
        """Return the fewest and the most of ``steps`` that are computed."""
        if self.kind == OFF or steps < FEWEST_STEPS:
            return steps, steps
        if self.kind == PLAN:
            return min(self.planned, steps), min(self.planned, steps)
        return WARM + -(-(steps - WARM) // (MOST_SKIPPED + 1)), steps

    @property
    def word(self) -> str:
        """As flags and files spell it."""
        told = {OFF: "", BUDGET: f":{self.budget}", PLAN: f":{self.planned}"}
        return self.kind + told[self.kind]

    def told(self, steps: range, job: int) -> str | None:
        """Return what is to be said of it where it does nothing in ``steps`` of a ``job``'s."""
        if self.kind == OFF or self.skips(len(steps)):
            return None
        if len(steps) == job:
            return f"the step cache gains nothing with {job} steps: all of them are computed"
        few = f", as fewer than {FEWEST_STEPS} in a row are" if len(steps) < FEWEST_STEPS else ""
        return (
            f"the step cache gains nothing in steps {steps.start + 1} to {steps.stop} of {job}: "
            f"all of them are computed{few}"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
