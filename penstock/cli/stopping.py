"""What Ctrl-C, SIGTERM and a terminal that hangs up do to a command that runs a job."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType

from penstock.errors import JobCancelled

_STILL = b"note: still stopping: what is done is being saved\n"


class Stopping:
    """Signals ask the job to stop instead of tearing it down, however many of them come.

    Before there is a job they end the command at once. A hang-up that whoever started the process
    has told it to ignore (``nohup``) stays ignored.
    """

    def __init__(self) -> None:
        self._cancel: Callable[[], None] | None = None
        self._asked = False
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def at(self, cancel: Callable[[], None]) -> None:
        """Let a signal call ``cancel`` from now on."""
        self._cancel = cancel

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._cancel is None:
            raise JobCancelled("stopped before the job began", found=signal.Signals(number).name)
        if self._asked:
            _write(_STILL)
        self._asked = True
        self._cancel()

    def __enter__(self) -> Stopping:
        self._before = [(number, signal.getsignal(number)) for number in self._signals]
        for number, handler in self._before:
            if handler is signal.SIG_IGN and number == getattr(signal, "SIGHUP", None):
                continue
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)


def _write(line: bytes) -> None:
    """Write past Python's buffers, in which a signal may have come."""
    try:
        os.write(sys.stderr.fileno(), line)
    except (OSError, ValueError):
        return
