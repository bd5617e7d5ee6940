"""Bytes under a hard cap: reserved before they are allocated, given back when they are freed."""

from __future__ import annotations

import threading

from penstock.closing import Closing
from penstock.errors import LedgerOverflow, UsageError
from penstock.units import format_bytes

_NAMED_HOLDERS = 4


class Reservation(Closing):
    """Bytes held in a ledger until released; a context manager.

    Attributes:
        label: what the bytes are for.
        nbytes: how many.
    """

    def __init__(self, ledger: ByteLedger, label: str, nbytes: int) -> None:
        self._ledger: ByteLedger | None = ledger
        self.label, self.nbytes = label, nbytes

    def close(self) -> None:
        """Give the bytes back; a second call does nothing."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger._give_back(self.label, self.nbytes)


class ByteLedger:
    """What one memory holds, by label, never above ``cap_bytes``. Safe to use from any thread.

    Args:
        name: of the memory, for messages: ``"VRAM"``, ``"RAM"``.
        cap_bytes: the ceiling, positive.
    """

    def __init__(self, name: str, cap_bytes: int) -> None:
        if cap_bytes <= 0:
            raise UsageError(
                f"the {name} budget must be positive",
                expected="1 byte or more",
                found=f"{cap_bytes:,} bytes",
            )
        self.name, self.cap_bytes = name, cap_bytes
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._used = self._peak = 0

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    @property
    def peak(self) -> int:
        """Most bytes that were reserved at once, since the beginning or the last `reset_peak`."""
        return self._peak

    @property
    def free(self) -> int:
        """Bytes that can still be reserved."""
        return self.cap_bytes - self._used

    def reset_peak(self) -> None:
        """Begin a new peak at what is reserved now."""
        with self._lock:
            self._peak = self._used

    def by_label(self) -> dict[str, int]:
        """Return the bytes reserved now, by label, the largest first."""
        with self._lock:
            return dict(sorted(self._held.items(), key=lambda item: -item[1]))

    def reserve(self, label: str, nbytes: int) -> Reservation:
        """Take ``nbytes`` (zero or more) under ``label``.

        Raises:
            LedgerOverflow: they would pass the cap; names the need, what is free and the holders.
        """
        if nbytes < 0:
            raise UsageError(
                f"{label}: a reservation cannot be negative",
                expected="0 bytes or more",
                found=f"{nbytes:,} bytes",
            )
        with self._lock:
            if self._used + nbytes > self.cap_bytes:
                raise self._overflow(label, nbytes)
            self._used += nbytes
            self._peak = max(self._peak, self._used)
            self._held[label] = self._held.get(label, 0) + nbytes
        return Reservation(self, label, nbytes)

    def _overflow(self, label: str, nbytes: int) -> LedgerOverflow:
        largest = sorted(self._held.items(), key=lambda item: -item[1])[:_NAMED_HOLDERS]
        holders = ", ".join(f"{name} {format_bytes(held)}" for name, held in largest) or "nothing"
        return LedgerOverflow(
            f"{label} does not fit into the {self.name} budget of {self.cap_bytes:,} bytes",
            memory=self.name,
            expected=f"{nbytes:,} bytes free",
            found=f"{self.free:,} (held: {holders})",
            remedy=f"Raise the {self.name} budget, or ask for a smaller video.",
        )

    def _give_back(self, label: str, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes
            left = self._held.pop(label, 0) - nbytes  # absent: only empty reservations are left
            if left:
                self._held[label] = left
