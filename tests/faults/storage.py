"""File operations that fail, kill the process or are written down, in place of the real ones."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.engine.store.durable import FileOps

CHANGING = (
    "create", "write", "allocate", "fsync", "rename", "fsync_dir", "truncate", "unlink", "mkdir",
)  # fmt: skip
READING = ("read", "names", "size", "free_bytes")
OPERATIONS = (*CHANGING, *READING)
PACKING = (*CHANGING, "append")
"""What packing changes files with; a journal never appends to a file that it has closed."""


class InterceptedOps(FileOps):
    """The real operations with a call before and after each one of `OPERATIONS`."""

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        """Called before an operation; may raise in its place."""

    def after(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Called after an operation that succeeded."""


def _intercepted(operation: str) -> Callable[..., Any]:
    def call(self: InterceptedOps, *arguments: Any) -> Any:
        self.before(operation, arguments)
        result = getattr(FileOps, operation)(self, *arguments)
        self.after(operation, arguments, result)
        return result

    return call


for _operation in {*OPERATIONS, *PACKING}:
    setattr(InterceptedOps, _operation, _intercepted(_operation))


class CountingOps(InterceptedOps):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        self.calls[operation] += 1


class FaultyOps(InterceptedOps):
    """Raises OSError at the Nth call of one operation, once or from then on.

    Also asserts the rule on fsync: a file whose fsync failed is neither synced again nor renamed.
    """

    def __init__(self, operation: str, at: int, code: int = errno.EIO, *, stays: bool = False):
        self._operation, self._at, self._code, self._stays = operation, at, code, stays
        self._calls = 0
        self._open: dict[int, Path] = {}
        self._abandoned: set[Path] = set()
        self.raised = 0

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "rename":
            assert arguments[0] not in self._abandoned, "renamed although its fsync had failed"
        if operation == "fsync":
            assert self._open[arguments[0]] not in self._abandoned, "fsync was tried again"
        if operation == self._operation:
            self._calls += 1
            if self._calls == self._at or (self._stays and self._calls > self._at):
                self._fail(operation, arguments)

    def _fail(self, operation: str, arguments: tuple[Any, ...]) -> None:
        self.raised += 1
        if operation == "fsync":
            self._abandoned.add(self._open[arguments[0]])
        if operation == "write":  # a full disk takes a part first
            FileOps.write(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise OSError(self._code, os.strerror(self._code))

    def after(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        if operation in ("create", "append"):
            self._open[result] = arguments[0]
            self._abandoned.discard(arguments[0])


class KillingOps(InterceptedOps):
    """Ends the process with SIGKILL at the Nth failpoint: before and after each changing operation.

    Args:
        at: number of the failpoint, from 0.
    """

    def __init__(self, at: int) -> None:
        self._left = at

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        self._pass(operation)

    def after(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        self._pass(operation)

    def _pass(self, operation: str) -> None:
        if operation not in PACKING:
            return
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


class RecordingOps(InterceptedOps):
    """Writes down every changing operation; ``skip`` leaves some out, as a forgetful program would.

    ``log`` holds ``(operation, path, argument)``: the bytes of a write, the target of a rename.
    """

    def __init__(self, skip: frozenset[str] = frozenset()) -> None:
        self.log: list[tuple[str, Path, Any]] = []
        self._skip = skip
        self._open: dict[int, Path] = {}

    def after(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        if operation in ("create", "append"):
            self._open[result] = arguments[0]
        if operation not in CHANGING or operation in self._skip:
            return
        first = arguments[0]
        path = self._open[first] if isinstance(first, int) else first
        extra = arguments[1] if len(arguments) > 1 else None
        if operation == "write":
            extra = bytes(extra[:result])
        self.log.append((operation, path, extra))
