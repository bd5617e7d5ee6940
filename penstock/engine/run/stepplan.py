"""Which steps a fixed number of forwards is best spent on, from one recorded run.

A run's guided velocities enter by their products with one another alone (a Gram matrix): every
prediction is a sum of two of them, so that the error of any schedule is known without computing a
step. Of each velocity a sample of its values is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from penstock.engine.files.fields import number, read_object, several
from penstock.engine.store.durable import FileOps, write_atomically
from penstock.errors import CheckpointError
from penstock.profiles.caching import FEWEST_STEPS, MOST_SKIPPED

MOST_STEPS = 1000

FARTHER = 12
"""How many steps a gap of a schedule may be wider than even ones."""

FORGIVEN = 0.65
"""How much of an error the later steps undo, from none of it at no noise to this share at nothing
but noise: they see where the latents are, and pull back. On the small trained model 0.3 to 0.5 of
errors at noise levels of 0.9 were left at the end, and 0.7 to 0.8 at 0.4."""

_LEVELS = several(number(0, 1), 2, MOST_STEPS)
_PRODUCTS = several(number(-1e30, 1e30), 3, MOST_STEPS * (MOST_STEPS + 1) // 2)
"""Far beyond any velocity's, and their sums and squares stay finite."""

Node = tuple[int, int]
"""Two steps that are computed one after the other; the first of a part has -1 before it."""

Course = tuple[float, tuple[int, ...], tuple[float, ...]]
"""What the skipped steps have cost so far, the computed ones, and their damping."""


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
    products: NDArray[np.float64]

    @classmethod
    def of(cls, levels: Sequence[float], samples: Sequence[ArrayLike]) -> Recorded:
        """Make it from the sample of each step's velocity, on the CPU."""
        rows = np.stack([np.asarray(sample, dtype=np.float64).ravel() for sample in samples])
        return cls(tuple(levels), rows @ rows.T / rows.shape[1])

    @classmethod
    def built_in(cls) -> Recorded:
        """Return the mean of runs of the small model in the box."""
        with as_file(files("penstock").joinpath("assets", "steps.json")) as path:
            return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """Make it from a file.

        Raises:
            CheckpointError: it holds something else.
        """
        found = read_object(path)
        said: tuple[Any, Any] = found.get("levels"), found.get("products")
        for each, field in zip(said, (_LEVELS, _PRODUCTS), strict=True):
            if not field.fits(each):
                raise _bad(path, f"something else than {field.told}")
        levels, flat = tuple(map(float, said[0])), np.array(said[1], dtype=np.float64)
        steps = len(levels)
        falls = all(one > other for one, other in zip(levels, levels[1:], strict=False))
        if not falls or levels[-1] == 0:
            raise _bad(path, f"{steps} noise levels")
        if len(flat) != steps * (steps + 1) // 2:
            raise _bad(path, f"{len(flat)} products of {steps} velocities")
        upper = np.zeros((steps, steps))
        upper[np.triu_indices(steps)] = flat
        return cls(levels, upper + np.triu(upper, 1).T)

    def write(self, path: Path) -> None:
        """Write it into a file; `read` gives the same again, to nine digits.

        Raises:
            OSError: it cannot be written.
        """
        steps = len(self.levels)
        flat = self.products[np.triu_indices(steps)].tolist()
        value = {"levels": self.levels, "products": [float(f"{each:.9g}") for each in flat]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(FileOps(), path, [json.dumps(value).encode()])

    def at(self, levels: Sequence[float]) -> Recorded:
        """As if it had been recorded at other ``levels``: each velocity on the line between the
        nearest two, or as the outermost."""
        places = np.zeros((len(levels), len(self.levels)))
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


class _Gaps:
    """What skipping steps in a row leaves of error, each gap in a few operations: sums from the
    first step on are made once, and a gap's are the differences of two.

    Args:
        recorded: a run.
        left: of an error in each step's velocity.
    """

    def __init__(self, recorded: Recorded, left: Sequence[float]) -> None:
        # Only differences of velocities enter, so any origin does; from their mean the numbers are
        # small, and little is lost where two sums nearly cancel.
        raw = recorded.products
        mean = raw.mean(0)
        products = raw - mean - mean[:, None] + mean.mean()
        weights = np.asarray(left, dtype=np.float64)
        weighted = weights[:, None] * products
        self._products = products.tolist()
        self._left = _sums(weights).tolist()
        self._moments = _sums(weights * np.arange(len(weights))).tolist()
        self._each = _sums(weighted).tolist()  # with each velocity
        self._both = _sums(_sums(weighted * weights).T).tolist()

    def between(self, b: int, a: int, n: int) -> tuple[float, float]:
        """Return the squared error that skipping all between ``a`` and ``n`` leaves, and the
        damping.

        Args:
            b: the step that was computed before ``a``; -1: none, and v_a is held.
        """
        if n == a + 1:
            return 0.0, 0.0
        # The error of holding v_a is the sum of left * (v_step - v_a). Its square needs inner
        # products alone, which is why a record keeps nothing else.
        own, first = self._products[a], a + 1
        count = self._left[n] - self._left[first]
        with_a = self._each[n][a] - self._each[first][a] - count * own[a]
        sums = self._both
        square = sums[n][n] - sums[n][first] - sums[first][n] + sums[first][first]
        error = max(square - count * (2 * with_a + count * own[a]), 0.0)
        if b < 0:
            return error, 0.0
        # What the line adds of v_a - v_b over all of them, and its products with that error.
        far = (self._moments[n] - self._moments[first] - a * count) * line(a, b, a + 1, 1.0)
        with_b = self._each[n][b] - self._each[first][b] - count * own[b]
        both = far * (with_a - with_b)
        slope = far * far * (own[a] - 2 * own[b] + self._products[b][b])
        # Least squares in one unknown: the share of the line's slope that leaves the least error.
        damping = min(max(both / slope, 0.0), 1.0) if slope > 0 else 0.0
        return error - 2 * damping * both + damping * damping * slope, damping


def _sums(of: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of none, of the first, of the first two and so on."""
    sums = np.zeros((len(of) + 1, *of.shape[1:]))
    np.cumsum(of, axis=0, out=sums[1:])
    return sums


def best_schedule(
    recorded: Recorded, left: Sequence[float], forwards: int, starts: Sequence[int] = ()
) -> Schedule:
    """Return the schedule of so many forwards whose skipped steps cost least.

    Args:
        recorded: a run at the levels of the job.
        left: of an error in each step's velocity (`left_of_errors`).
        forwards: at most as many as steps; at least the first and the last step of each part.
        starts: where another network's steps begin, or steps of another kind: no line goes from one
            part into the next.
    """
    steps, gap = len(recorded.levels), _Gaps(recorded, left).between
    starting = {0, *starts}
    # Twice the even gap: the first steps are skipped most. No farther beyond it than `FARTHER`, for
    # the search grows with the square of the gaps.
    even = -(-(steps - 1) // (forwards - 1))
    farthest = max(MOST_SKIPPED + 1, even + min(even, FARTHER))

    def following(a: int, more: int) -> range:
        """Return the steps that may be computed next after ``a``, ``more`` of them before the
        end."""
        if a + 1 in starting:
            return range(a + 1, a + 2)
        end = min((start - 1 for start in starting if start > a), default=steps - 1)
        last = min(a + farthest, end, steps - 1 - more)
        return range(max(a + 1, steps - 1 - more * farthest), last + 1)

    def found() -> list[Course]:
        # Shortest paths over pairs of computed steps: the next gap's cost depends on the last two
        # (the line goes through both), and on nothing before them.
        paths: dict[Node, Course] = {(-1, 0): (0.0, (0,), ())}
        for more in range(forwards - 2, -1, -1):  # computed steps that follow the next one
            longer: dict[Node, Course] = {}
            for (b, a), (cost, computed, damping) in paths.items():
                for n in following(a, more):
                    error, damped = gap(b, a, n)
                    node = (-1 if n in starting else a, n)
                    path = (cost + error, (*computed, n), (*damping, damped))
                    if node not in longer or path < longer[node]:
                        longer[node] = path
            paths = longer
        return [path for (_, end), path in paths.items() if end == steps - 1]

    while not (whole := found()) and farthest < steps:
        farthest *= 2  # a long part is left two forwards where short ones take the others
    _, computed, damping = min(whole)
    return Schedule(computed, (*damping, 0.0))


@lru_cache(256)
def shared_forwards(
    levels: tuple[float, ...], parts: tuple[range, ...], forwards: int
) -> tuple[int, ...]:
    """Share out the forwards of a job among its parts, as loses least in runs of the small model.

    Before anything of the model is known: plans count by it, and a job keeps to them. (By steps
    alone, the many that lie at high noise, where little bends, took them from the last: with two
    transformers of 26 and 14 steps that cost 13 dB and more, see ``benchmarks/cache_parts.py``.)

    Args:
        levels: noise before each step.
        parts: one after another, of all these steps.
        forwards: in all. A part of fewer than `FEWEST_STEPS` has all of its steps, another one its
            first and last at least.
    """
    short = [step for part in parts if len(part) < FEWEST_STEPS for step in part]
    long = [part for part in parts if len(part) >= FEWEST_STEPS]
    fitting = min(max(forwards, len(short) + 2 * len(long)), len(levels))
    after = (*levels[1:], 0.0)
    drops = [level - lower for level, lower in zip(levels, after, strict=True)]
    schedule = best_schedule(
        Recorded.built_in().at(levels), left_of_errors(levels, drops), fitting,
        starts=(*short, *(part.start for part in long)),
    )  # fmt: skip
    return tuple(sum(step in part for step in schedule.computed) for part in parts)
