"""A stream whose host half is open while the phases before its own work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from penstock.offload.layout import BlockLayout
from penstock.offload.streamer import BlockStream


class Prefetcher:
    """At most one such stream; whoever ends a job drops it."""

    def __init__(self) -> None:
        self._stream: BlockStream | None = None
        self._layouts: Sequence[BlockLayout] = ()
        self._stack = ExitStack()

    @property
    def is_reading(self) -> bool:
        """Whether there is one."""
        return self._stream is not None

    def begin(self, layouts: Sequence[BlockLayout], stream: BlockStream) -> None:
        """Let ``stream``, over ``layouts``, begin to read.

        Raises:
            LedgerOverflow: its buffers in host memory do not fit the budget.
        """
        self._stack.enter_context(stream.prefetched())
        self._stream, self._layouts = stream, layouts

    def take(self, layouts: Sequence[BlockLayout], stack: ExitStack) -> BlockStream | None:
        """Return the stream over just these ``layouts``, if there is one; ``stack`` ends it."""
        same = len(self._layouts) == len(layouts)
        if self._stream is None or not same or self._layouts[0] is not layouts[0]:
            return None
        stream, self._stream = self._stream, None
        stack.push(self._stack.pop_all())
        return stream

    def drop(self) -> None:
        """Give everything back, if there is one that nobody took."""
        self._stream = None
        self._stack.close()
