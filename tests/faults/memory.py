"""Memory that runs out where a test wants it to: at a reservation, or at an allocation."""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from penstock.engine import engine
from penstock.engine.families.minimax_h3 import work as h3
from penstock.engine.families.wan import work
from penstock.errors import LedgerOverflow
from penstock.offload.ledger import ByteLedger, Reservation

_OWNERS: dict[str, Any] = {"denoise_forward": work.dit, "packed_forward": h3}


class Reservations:
    """Inside the context every reservation is counted, and the Nth is refused.

    Args:
        fail_at: number of the reservation that is refused, from 1; 0: none.
        stays: all later ones of that ledger are refused too.
    """

    def __init__(self, *, fail_at: int = 0, stays: bool = False) -> None:
        self.calls = self.failed = 0
        self._fail_at, self._stays = fail_at, stays
        self._lock = threading.Lock()
        self._original = ByteLedger.reserve

    def __enter__(self) -> Reservations:
        original = self._original

        def reserve(ledger: ByteLedger, label: str, nbytes: int) -> Reservation:
            with self._lock:
                self.calls += 1
                late = self._fail_at and self.calls > self._fail_at and self._stays
                fails = self.calls == self._fail_at or late
                self.failed += bool(fails)
            if fails:
                raise LedgerOverflow(f"no room for {label} (a test)", memory=ledger.name)
            return original(ledger, label, nbytes)

        ByteLedger.reserve = reserve  # type: ignore[method-assign]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ByteLedger.reserve = self._original  # type: ignore[method-assign]


class DeviceAllocations:
    """Inside the context, every operation that makes a tensor is counted, and the Nth fails.

    Covers the job's own thread from the entry into a function of the pipeline to its exit.

    Args:
        inside: "run" for a whole job, "denoise_forward" for the passes of Wan's transformer,
            "packed_forward" for those of MiniMax-H3's.
        fail_at: number of the operation that fails, from 1; 0: none.
        stays: all later ones fail too.
        error: what is raised; out of memory unless given.
        watch: takes a weak reference to every tensor that was made.
    """

    def __init__(
        self,
        *,
        inside: str,
        fail_at: int = 0,
        stays: bool = False,
        error: Exception | None = None,
        watch: list[weakref.ref[torch.Tensor]] | None = None,
    ) -> None:
        self.calls = self.failed = 0
        self._inside, self._fail_at, self._stays = inside, fail_at, stays
        self._error, self._watch = error, watch

    def count(self) -> None:
        """One more allocation."""
        self.calls += 1
        if self.calls == self._fail_at or (
            self._fail_at and self._stays and self.calls > self._fail_at
        ):
            self.failed += 1
            raise self._error or torch.OutOfMemoryError(f"out of memory at {self.calls} (a test)")

    def note(self, made: Any) -> None:
        """Watch what was made."""
        if self._watch is not None:
            leaves = (leaf for leaf in tree_iter(made) if isinstance(leaf, torch.Tensor))
            self._watch.extend(map(weakref.ref, leaves))

    def __enter__(self) -> DeviceAllocations:
        self._owner = _OWNERS.get(self._inside, engine)
        self._original = getattr(self._owner, self._inside)
        original = self._original

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with _Counting(self):
                return original(*arguments, **named)

        setattr(self._owner, self._inside, wrapped)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(self._owner, self._inside, self._original)


class _Counting(TorchDispatchMode):
    def __init__(self, faults: DeviceAllocations) -> None:
        super().__init__()
        self._faults = faults

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        on_meta = torch.device((kwargs or {}).get("device") or "cpu").type == "meta"
        if not on_meta and not _is_view(func):
            self._faults.count()
        made = func(*args, **(kwargs or {}))
        self._faults.note(made)
        return made


def _is_view(func: Any) -> bool:
    """Whether an operation returns a view of an argument or works in place: no new memory."""
    return any(result.alias_info is not None for result in func._schema.returns)
