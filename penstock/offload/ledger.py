"""A ledger of bytes under a hard cap: what is not reserved is not allocated."""

from __future__ import annotations

import threading
from types import TracebackType

from penstock.errors import LedgerOverflow
from penstock.units import format_bytes


class Reservation:
    """Bytes held in a ledger until released; a context manager."""

    def __init__(self, ledger: ByteLedger, label: str, nbytes: int) -> None:
        self.label, self.nbytes = label, nbytes
        self._ledger: ByteLedger | None = ledger

    def release(self) -> None:
        """Give the bytes back. A second call does nothing."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger._release(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class ByteLedger:
    """Counts the bytes of one memory (VRAM or RAM) and refuses to pass its cap.

    Args:
        name: of the memory, for messages.
        cap_bytes: the most that may be reserved at once.
    """

    def __init__(self, name: str, cap_bytes: int) -> None:
        self.name, self.cap_bytes = name, cap_bytes
        self._held: list[Reservation] = []
        self._used = self._peak = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    @property
    def peak(self) -> int:
        """The most bytes that were reserved at once since the last `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Forget the peak: it is what is reserved now."""
        with self._lock:
            self._peak = self._used

    def reserve(self, label: str, nbytes: int) -> Reservation:
        """Reserve ``nbytes`` for ``label``.

        Raises:
            LedgerOverflow: they do not fit under the cap; names the largest holders.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        with self._lock:
            if self._used + nbytes > self.cap_bytes:
                raise self._overflow(label, nbytes)
            reservation = Reservation(self, label, nbytes)
            self._held.append(reservation)
            self._used += nbytes
            self._peak = max(self._peak, self._used)
        return reservation

    def by_label(self) -> dict[str, int]:
        """Bytes reserved now, by label."""
        totals: dict[str, int] = {}
        with self._lock:
            for held in self._held:
                totals[held.label] = totals.get(held.label, 0) + held.nbytes
        return totals

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            self._held.remove(reservation)
            self._used -= reservation.nbytes

    def _overflow(self, label: str, nbytes: int) -> LedgerOverflow:
        largest = sorted(self._held, key=lambda held: -held.nbytes)[:3]
        holders = ", ".join(f"{held.label} {format_bytes(held.nbytes)}" for held in largest)
        free = self.cap_bytes - self._used
        return LedgerOverflow(
            f"{self.name}: no room for {label}",
            expected=f"{nbytes:,} bytes free",
            found=f"{free:,} of {self.cap_bytes:,} (held by {holders or 'nobody'})",
            remedy="The plan promised less than this: please report it with the plan's JSON",
        )
