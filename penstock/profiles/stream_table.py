"""Every stream of a network as columns, of which a search takes those that fit and may win.

Needs numpy, which nothing else of a plan does: imported by the first search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from penstock.profiles.policy import Limits
from penstock.profiles.rates import Rates
from penstock.profiles.streams import ROUNDING, Pace, Placement

Column: TypeAlias = npt.NDArray[np.int64]
Seconds: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.bool_]


class Table:
    """Every stream of a network, a row each, in columns.

    A search looks at thousands of streams, and a plan makes hundreds of searches.

    Attributes:
        choice, slots, staging: which of the placements, with which rings.
        vram, ram, pinned: bytes that are held.
        read, copied: bytes moved in every pass after the first; device: bytes that stay there.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        places: tuple[Placement, ...],
        every: Sequence[tuple[int, int, int]],
    ) -> None:
        self.choice, self.slots, self.staging = (_column(c) for c in zip(*every, strict=True))

        def of_places(values: Iterable[int]) -> Column:
            return _column(values)[self.choice]

        resident = of_places(place.device_resident for place in places)
        self.device = of_places(place.device_bytes for place in places)
        self.copied = of_places(place.copied_bytes for place in places)
        self.read = of_places(place.read_bytes for place in places)
        self._host = of_places(place.host_bytes for place in places)
        self._streamed = 1 - resident / len(blocks)
        self._first = np.where((self.staging > 0) | (resident == 0), blocks[0], 0)
        self._arriving = np.where(self.staging > 0, self.device, 0)
        slot = of_places(place.slot_bytes for place in places)
        ring = (places[choice].ring_bytes(staging) for choice, _, staging in every)
        self.vram = self.device + self.slots * slot
        self.ram = self._host + _column(ring)
        self.pinned = np.where(self.staging > 0, self.ram, self._host)

    def inside(self, room: Limits) -> Rows:
        """Return of each stream whether it fits."""
        fits: Rows = (self.vram <= room.vram_bytes) & (self.ram <= room.ram_bytes)
        if room.pinned_bytes is not None:
            fits &= self.pinned <= room.pinned_bytes
        if room.both_bytes is not None:
            fits &= self.vram + self.ram <= room.both_bytes
        return fits

    def by_bound(
        self, rows: Rows, pace: Pace, rates: Rates, better_than: float
    ) -> Iterator[tuple[float, int, int, int, int]]:
        """Yield those of ``rows`` whose bound is not above ``better_than``, the smallest first: the
        bound, the bytes in both memories, choice, slots and buffers."""
        leasts, taken = self.least_objectives(pace, rates), self.vram + self.ram
        kept = np.flatnonzero(rows & (leasts <= better_than))
        columns = leasts, taken, self.choice, self.slots, self.staging
        ordered = kept[np.lexsort([column[kept] for column in reversed(columns)])]
        for row in ordered:
            yield tuple(column[row].item() for column in columns)

    def least_objectives(self, pace: Pace, rates: Rates) -> Seconds:
        """Return a lower bound of each stream's seconds: what follows one another in each queue, or
        in the two that a ring of one makes take turns; computing waits for the first block."""
        copy_s, read_s = 1 / rates.copy_bytes_per_s, 1 / rates.read_bytes_per_s
        copied, disk = pace.passes * self.copied, pace.passes * self.read
        compute_s = pace.passes * pace.compute_s
        least = compute_s + self._first * (read_s + copy_s)
        least = np.maximum(least, (copied + self._arriving) * copy_s)
        least = np.maximum(least, (disk + self._arriving + self._host) * read_s)
        # With one slot a copy and the computation exclude each other; with one staging buffer, a
        # read and the copy out of it.
        turns = np.where(self.slots == 1, copied * copy_s + compute_s * self._streamed, 0.0)
        least = np.maximum(least, turns)
        turns = np.where(self.staging == 1, (disk + self._arriving) * (read_s + copy_s), 0.0)
        least = np.maximum(least, turns)
        # Without staging buffers what stays on the device comes first, as in `_opening_s`.
        opening = (self.device - self._arriving) * (read_s + copy_s)
        moved = self.copied / rates.copy_bytes_per_s + self.read / rates.read_bytes_per_s
        bound: Seconds = (opening + least) * (1 - ROUNDING) + pace.care * pace.passes * moved
        return bound


def _column(values: Iterable[int]) -> Column:
    return np.fromiter(values, dtype=np.int64)
