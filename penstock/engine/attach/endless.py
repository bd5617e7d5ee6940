"""Passes over streamed blocks, where nobody knows how many will be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from penstock.closing import Closing
from penstock.offload.streamer import BlockStream

CYCLES = 256
"""Passes before a stream is opened anew. Its threads walk the whole schedule, looking for what is
theirs, so that a stream without end in which a queue has nothing to do would keep a core busy."""


class EndlessStream(Closing):
    """A `BlockStream` opened again whenever its passes are used up; a context manager.

    Args:
        make: a stream of so many passes.
    """

    def __init__(self, make: Callable[[int], BlockStream]) -> None:
        self._make = make
        self._stream: BlockStream | None = None
        self._left = 0
        self._read = self._copied = 0

    def __enter__(self) -> EndlessStream:
        self._stream = self._make(CYCLES)
        self._stream.__enter__()
        self._left = CYCLES
        return self

    def close(self) -> None:
        """End the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            self._read += stream.stats.read_bytes
            self._copied += stream.stats.copied_bytes

    def forward_pass(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """One pass, to be gone through to its end: index and tensors of each block.

        Raises:
            CheckpointChanged, ...: as `BlockStream.forward_pass`.
        """
        if self._left == 0:
            self.close()
            self.__enter__()
        self._left -= 1
        assert self._stream is not None
        yield from self._stream.forward_pass()

    @property
    def read_bytes(self) -> int:
        """From disk to host memory, so far."""
        return self._read + (self._stream.stats.read_bytes if self._stream else 0)

    @property
    def copied_bytes(self) -> int:
        """From host memory to the device, so far."""
        return self._copied + (self._stream.stats.copied_bytes if self._stream else 0)
