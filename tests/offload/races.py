"""Finds unordered accesses: PyTorch's CUDA sanitizer, told of host threads, buffers and disk reads.

The sanitizer's event handler takes any ids. Here its "streams" are the device's streams and the
host's threads alike, and its data are device buffers, host buffers, and the table of events. What
it knows of order comes from waits alone, so that what it finds does not depend on luck.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from types import SimpleNamespace
from typing import Any

from torch.cuda import _sanitizer


class RaceChecker:
    """Order, as the waits make it.

    Attributes:
        races: what was found, in words.
    """

    def __init__(self) -> None:
        self._handler: Any = _sanitizer.EventHandler()
        self._events = 0
        self.races: list[str] = []

    def record(self, event: Hashable, by: str) -> None:
        """What ``by`` has done until now is behind ``event``."""
        self._handler._handle_event_record(event, by)

    def wait(self, event: Hashable, by: str) -> None:
        """What ``by`` does from now on comes after ``event``, if that was recorded."""
        if event in self._handler.syncs.recorded_sync_states:
            self._handler._handle_event_wait(event, by)

    def follow(self, earlier: str, later: str) -> None:
        """What ``later`` does from now on comes after what ``earlier`` did until now."""
        self._events += 1
        event = ("once", self._events)
        self.record(event, earlier)
        self.wait(event, later)
        self._handler._handle_event_deletion(event)

    def access(
        self, by: str, what: str, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()
    ) -> None:
        """``by`` reads and writes data."""
        read, written = set(reads), set(writes)
        names = dict.fromkeys([*read, *written], [what])
        for error in self._handler._handle_kernel_launch(by, read, written, set(), what, names):
            then, now = error.previous_access, error.current_access
            self.races.append(
                f"{now.operator} ({now.stream}) is not after {then.operator} ({then.stream})"
            )


NO_TRACES = SimpleNamespace(
    StackSummary=SimpleNamespace(extract=lambda frames, lookup_lines=False: []),
    walk_stack=lambda frame: (),
)
"""In place of the sanitizer's `traceback`: it would walk the stack at every access."""
