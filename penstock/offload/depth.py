"""How many read requests are in flight: as many as make reading faster, and no more."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

FIRST = 4
"""Reads at a time to begin with: one does not fill an NVMe disk's queue."""

MOST = 32
"""Beyond this no disk gets faster, and every request is a thread."""

GAIN = 1.05
"""What a doubled depth must bring to be kept."""

SAMPLES = 3
"""Blocks that are read at a depth before it is judged."""

SETTLED = 64
"""Blocks after which a larger depth is tried again: another process may have left the disk."""


class QueueDepth:
    """Doubled while that raises the rate; else the last depth that did.

    Attributes:
        now: reads at a time.
    """

    def __init__(self, first: int = FIRST, most: int = MOST) -> None:
        self.now, self._most = first, most
        self._best, self._best_rate = first, 0.0
        self._start(first, SAMPLES)

    def _start(self, depth: int, samples: int) -> None:
        log.debug("%d reads at a time for %d blocks", depth, samples)
        self.now, self._left = depth, samples
        self._nbytes, self._seconds = 0, 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        """Note that a block of ``nbytes`` was read at the depth ``now`` in ``seconds``."""
        self._nbytes += nbytes
        self._seconds += seconds
        self._left -= 1
        if self._left == 0:
            self._judge(self._nbytes / max(self._seconds, 1e-9))

    def _judge(self, rate: float) -> None:
        if self.now == self._best and self._best_rate:  # it was settled: look around again
            self._best_rate = rate
            self._try_more()
        # Only a clear gain doubles the depth: noise alone would drive it to the most.
        elif rate > GAIN * self._best_rate:
            self._best, self._best_rate = self.now, rate
            self._try_more()
        else:
            self._start(self._best, SETTLED)

    def _try_more(self) -> None:
        if self.now < self._most:
            self._start(min(2 * self.now, self._most), SAMPLES)
        else:
            self._start(self.now, SETTLED)
