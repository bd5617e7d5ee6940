"""Which steps a fixed number of forwards is best spent on, from one recorded run.

A run's guided velocities enter by their products with one another alone (a Gram matrix): every
prediction is a sum of two of them, so that the error of any schedule is known without computing a
step. Of each velocity a sample of its values is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.files.fields import read_object
from penstock.engine.store.durable import FileOps, write_atomically
from penstock.errors import CheckpointError
from penstock.profiles.caching import MOST_SKIPPED

SAMPLE = 1024
"""Values of each velocity that are looked at."""

MOST_STEPS = 1000

FARTHER = 12
"""How many steps a gap of a schedule may be wider than even ones."""

FORGIVEN = 0.65
"""How much of an error the later steps undo, from none of it at no noise to this share at nothing
but noise: they see where the latents are, and pull back. On the small trained model 0.3 to 0.5 of
errors at noise levels of 0.9 were left at the end, and 0.7 to 0.8 at 0.4."""

Node = tuple[int, int]
"""Two steps that are computed one after the other; the first has -1 before it."""


@dataclass(frozen=True)
class Schedule:
    """Steps that are computed, ascending, the first and the last among them; and for each of them
    what is taken of the slope over the steps that are skipped after it."""

    computed: tuple[int, ...]
    damping: tuple[float, ...]


@dataclass(frozen=True)
class Recorded:
    """What is kept of a run.

    Attributes:
        levels: noise before each step, falling.
        products: of the velocities' samples with one another, ``(steps, steps)``, fp64.
    """

    levels: tuple[float, ...]
    products: Tensor

    @classmethod
    def of(cls, levels: Sequence[float], samples: Sequence[Tensor]) -> Recorded:
        """Make it from the sample of each step's velocity."""
        rows = torch.stack([sample.double().flatten() for sample in samples])
        return cls(tuple(levels), rows @ rows.T / rows.shape[1])

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """Make it from a file.

        Raises:
            CheckpointError: it holds something else.
        """
        found = read_object(path)
        try:
            levels = tuple(float(level) for level in found["levels"])
            flat = torch.tensor(found["products"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise _bad(path, str(error)) from error
        steps = len(levels)
        falls = all(one > other for one, other in zip(levels, levels[1:], strict=False))
        if not 2 <= steps <= MOST_STEPS or not falls or not 0 < levels[-1] <= levels[0] <= 1:
            raise _bad(path, f"{steps} noise levels")
        if flat.shape != (steps * (steps + 1) // 2,) or not bool(flat.isfinite().all()):
            raise _bad(path, f"products of shape {tuple(flat.shape)}")
        upper = torch.zeros(steps, steps, dtype=torch.float64)
        upper[tuple(torch.triu_indices(steps, steps))] = flat
        return cls(levels, upper + upper.triu(1).T)

    def write(self, path: Path) -> None:
        """Write it into a file; `read` gives the same again, to nine digits.

        Raises:
            OSError: it cannot be written.
        """
        steps = len(self.levels)
        flat = self.products[tuple(torch.triu_indices(steps, steps))].tolist()
        value = {"levels": self.levels, "products": [float(f"{each:.9g}") for each in flat]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(FileOps(), path, [json.dumps(value).encode()])

    def at(self, levels: Sequence[float]) -> Recorded:
        """As if it had been recorded at other ``levels``: each velocity on the line between the
        nearest two, or as the outermost."""
        places = torch.zeros(len(levels), len(self.levels), dtype=torch.float64)
        for row, level in enumerate(levels):
            after = next((k for k, known in enumerate(self.levels) if known <= level), None)
            if not after:
                places[row, -1 if after is None else 0] = 1.0
                continue
            high, low = self.levels[after - 1], self.levels[after]
            places[row, after - 1] = (level - low) / (high - low)
            places[row, after] = (high - level) / (high - low)
        return Recorded(tuple(levels), places @ self.products @ places.T)


def _bad(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a record of a run's steps",
        expected="noise levels and products", found=found,
        remedy="The next whole job without a cache writes another",
    )  # fmt: skip


def sample(velocity: Tensor) -> Tensor:
    """Return some of its values, always from the same places, fp32 on the CPU."""
    flat = velocity.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].to("cpu", torch.float32, copy=True)


def line(a: int, b: int, step: int, damping: float) -> float:
    """Return what is added of ``v_a - v_b`` to ``v_a`` at ``step``; b < a < step are computed."""
    return damping * (step - a) / (a - b)


def left_of_errors(levels: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """Return how much of an error in each step's velocity is left at the end of a job.

    The share alone is not enough: a solver that looks back adds a velocity at one step and takes
    some of it back at the next, and at its last steps nearly all of it. What the transformer sees
    between the two is an error of the whole step, and it answers to that. So half of what counts is
    the share, and half the step in noise. (On the small trained model, 20 steps, what single errors
    left lay within a third of this; by the share alone one would count 1.7 times too little.)

    Args:
        levels: noise before each step of the whole job.
        shares: of each step's velocity in the result.
    """
    after = (*levels[1:], 0.0)
    return tuple(
        (abs(share) + level - lower) / 2 * (1 - FORGIVEN * level)
        for level, lower, share in zip(levels, after, shares, strict=True)
    )


def best_schedule(recorded: Recorded, left: Sequence[float], forwards: int) -> Schedule:
    """Return the schedule of so many forwards whose skipped steps cost least.

    Args:
        recorded: a run at the levels of the job.
        left: of an error in each step's velocity (`left_of_errors`).
        forwards: 2 and more, and at most as many as steps.
    """
    steps, products = len(recorded.levels), recorded.products.tolist()
    # Twice the even gap: the first steps are skipped most. No farther beyond it than `FARTHER`, for
    # the search grows with the square of the gaps.
    even = -(-(steps - 1) // (forwards - 1))
    farthest = max(MOST_SKIPPED + 1, even + min(even, FARTHER))

    @cache
    def gap(b: int, a: int, n: int) -> tuple[float, float]:
        """Return the squared error that skipping all between ``a`` and ``n`` leaves, and the
        damping."""
        held, sloped = [0.0] * steps, [0.0] * steps
        for step in range(a + 1, n):
            # The error of holding v_a, as weights of all velocities: sum of left * (v_step -
            # v_a). Its square needs inner products alone, which is why a record keeps nothing else.
            held[step] += left[step]
            held[a] -= left[step]
            if b >= 0:
                sloped[a] += left[step] * line(a, b, step, 1.0)
                sloped[b] -= left[step] * line(a, b, step, 1.0)
        error, both, slope = (
            sum(
                x[i] * y[j] * products[i][j]
                for i in range(max(b, 0), n)
                if x[i]
                for j in range(max(b, 0), n)
                if y[j]
            )
            for x, y in ((held, held), (held, sloped), (sloped, sloped))
        )
        # Least squares in one unknown: the share of the line's slope that leaves the least error.
        damping = min(max(both / slope, 0.0), 1.0) if slope > 0 else 0.0
        return error - 2 * damping * both + damping * damping * slope, damping

    # Shortest paths over pairs of computed steps: the next gap's cost depends on the last two (the
    # line goes through both), and on nothing before them.
    paths: dict[Node, tuple[float, tuple[int, ...], tuple[float, ...]]] = {(-1, 0): (0.0, (0,), ())}
    for more in range(forwards - 2, -1, -1):  # computed steps that follow the next one
        longer: dict[Node, tuple[float, tuple[int, ...], tuple[float, ...]]] = {}
        for (b, a), (cost, computed, damping) in paths.items():
            last = min(a + farthest, steps - 1 - more)
            for n in range(max(a + 1, steps - 1 - more * farthest), last + 1):
                error, damped = gap(b, a, n)
                found = (cost + error, (*computed, n), (*damping, damped))
                if (a, n) not in longer or found < longer[a, n]:
                    longer[a, n] = found
        paths = longer
    _, computed, damping = min(path for (_, end), path in paths.items() if end == steps - 1)
    return Schedule(computed, (*damping, 0.0))
