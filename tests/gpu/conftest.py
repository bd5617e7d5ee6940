"""Three minutes for a card's tests: a device machine is lent for little time. Tests are in the
order of what they are worth; what no time is left for is skipped by name."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

SECONDS = 180.0


class Allowance:
    """Time for tests, from the first of them on.

    Args:
        seconds: for all of them together; one that has begun is let finish.
        clock: gives seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: float | None = None

    def is_spent(self) -> bool:
        """Whether no other test may begin; the first call starts the clock."""
        if self._until is None:
            self._until = self._clock() + self._seconds
        return self._clock() >= self._until


_ALLOWED = pytest.StashKey[Allowance]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what comes after the time; where there is no card all skip by themselves."""
    if not torch.cuda.is_available():
        return
    allowed = item.config.stash.setdefault(_ALLOWED, Allowance(SECONDS, time.monotonic))
    if allowed.is_spent():
        pytest.skip(f"{SECONDS:.0f} s are over")
