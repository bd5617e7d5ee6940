"""Every stream of a network as columns, of which a search takes those that fit and may win.

Needs numpy, which nothing else of a plan does: imported by the first search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from penstock.profiles.policy import Limits
from penstock.profiles.rates import Rates

Column: TypeAlias = npt.NDArray[np.int64]
Seconds: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.bool_]


class Row(NamedTuple):
    """One stream: which placement with which rings, and its bytes.

    Attributes:
        choice: index of the placement.
        slots, staging: sizes of the rings.
        resident: blocks that stay on the device; device, host: bytes of residents.
        copied, read: bytes moved in every pass after the first.
        vram, ram: held.
    """

    choice: int
    slots: int
    staging: int
    resident: int
    device: int
    host: int
    copied: int
    read: int
    vram: int
    ram: int


class Table:
    """Every stream of a network, a row each, in columns named as in `Row`.

    A search looks at thousands of streams, and a plan makes hundreds of searches.
    """

    rounding = 1e-9
    """Sums of many small floats may end a little below the product they should be."""

    def __init__(self, blocks: Sequence[int], rows: Sequence[Row]) -> None:
        columns: Iterable[Column] = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
        (
            self.choice, self.slots, self.staging, resident, self.device, self._host,
            self.copied, self.read, self.vram, self.ram,
        ) = columns  # fmt: skip
        self.pinned = np.where(self.staging > 0, self.ram, self._host)
        self._streamed = 1 - resident / len(blocks)
        self._first = np.where((self.staging > 0) | (resident == 0), blocks[0], 0)
        self._arriving = np.where(self.staging > 0, self.device, 0)

    def inside(self, room: Limits) -> Rows:
        """Return of each stream whether it fits."""
        fits: Rows = (self.vram <= room.vram_bytes) & (self.ram <= room.ram_bytes)
        if room.pinned_bytes is not None:
            fits &= self.pinned <= room.pinned_bytes
        if room.both_bytes is not None:
            fits &= self.vram + self.ram <= room.both_bytes
        return fits

    def by_bound(
        self,
        rows: Rows,
        passes: int,
        compute_s: float,
        care: float,
        rates: Rates,
        better_than: float,
    ) -> Iterator[tuple[float, int, int, int, int]]:
        """Yield those of ``rows`` whose bound is not above ``better_than``, the smallest first: the
        bound, the bytes in both memories, choice, slots and buffers."""
        leasts, taken = self._least_objectives(passes, compute_s, care, rates), self.vram + self.ram
        kept = np.flatnonzero(rows & (leasts <= better_than))
        columns = leasts, taken, self.choice, self.slots, self.staging
        ordered = kept[np.lexsort([column[kept] for column in reversed(columns)])]
        for row in ordered:
            yield tuple(column[row].item() for column in columns)

    def _least_objectives(
        self, passes: int, compute_s: float, care: float, rates: Rates
    ) -> Seconds:
        """Return a lower bound of each stream's seconds: what follows one another in each queue, or
        in the two that a ring of one makes take turns; computing waits for the first block."""
        copy_s, read_s = 1 / rates.copy_bytes_per_s, 1 / rates.read_bytes_per_s
        copied, disk = passes * self.copied, passes * self.read
        computing_s = passes * compute_s
        least = computing_s + self._first * (read_s + copy_s)
        least = np.maximum(least, (copied + self._arriving) * copy_s)
        least = np.maximum(least, (disk + self._arriving + self._host) * read_s)
        # With one slot a copy and the computation exclude each other; with one staging buffer, a
        # read and the copy out of it.
        turns = np.where(self.slots == 1, copied * copy_s + computing_s * self._streamed, 0.0)
        least = np.maximum(least, turns)
        turns = np.where(self.staging == 1, (disk + self._arriving) * (read_s + copy_s), 0.0)
        least = np.maximum(least, turns)
        # Without staging buffers what stays on the device comes first, as in `_opening_s`.
        opening = (self.device - self._arriving) * (read_s + copy_s)
        moved = self.copied / rates.copy_bytes_per_s + self.read / rates.read_bytes_per_s
        bound: Seconds = (opening + least) * (1 - self.rounding) + care * passes * moved
        return bound
