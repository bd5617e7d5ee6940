"""Passes over streamed blocks, where nobody knows how many will be asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

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

    Attributes:
        skipped: visits that were left out.
    """

    def __init__(self, make: Callable[[int], BlockStream]) -> None:
        self._make = make
        self._stream: BlockStream | None = None
        self._at = 0
        self._read = self._copied = self._earlier = 0
        self._pauses: frozenset[int] = frozenset()
        self.skipped = 0

    def __enter__(self) -> EndlessStream:
        self._stream = self._make(CYCLES)
        self._stream.__enter__()
        self._stream.pause_after(self._pauses)
        return self

    def close(self) -> None:
        """End the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._earlier += _passes(self._at, stream.n_blocks)
            self._at = 0
            stream.close()
            self._read += stream.stats.read_bytes
            self._copied += stream.stats.copied_bytes

    def forward_pass(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield one pass, to be gone through to its end: index and tensors of each block.

        Raises:
            CheckpointChanged, ...: as `BlockStream.forward_pass`.
        """
        stream = self._opened(0)
        self._at += stream.n_blocks
        yield from stream.forward_pass()

    def pause_after(self, blocks: Collection[int]) -> None:
        """As `BlockStream.pause_after`, now and when it is opened again."""
        self._pauses = frozenset(blocks)
        if self._stream is not None:
            self._stream.pause_after(self._pauses)

    def announce(self, block: int) -> None:
        """``block`` is visited next; said while the visit before it is open."""
        stream = self._stream
        if stream is not None and self._at + (block - self._at) % stream.n_blocks < self._end:
            stream.announce(block)

    @contextmanager
    def visit(self, block: int) -> Iterator[Mapping[str, Tensor]]:
        """Provide the tensors of a block, whichever it is, until the context ends.

        Raises:
            CheckpointChanged, ...: as `BlockStream.visit`.
        """
        stream = self._opened(block)
        left = (block - self._at) % stream.n_blocks
        self._at += left + 1
        self.skipped += left
        with stream.visit(block) as tensors:
            yield tensors

    def _opened(self, block: int) -> BlockStream:
        """Return the stream, with a visit of ``block`` before its end."""
        assert self._stream is not None
        if self._at + (block - self._at) % self._stream.n_blocks >= self._end:
            self.close()
            self.__enter__()
        return self._stream

    @property
    def _end(self) -> int:
        """Visits until the stream is opened anew."""
        return 0 if self._stream is None else CYCLES * self._stream.n_blocks

    @property
    def passes(self) -> int:
        """Over all blocks so far, one that was begun included."""
        now = 0 if self._stream is None else _passes(self._at, self._stream.n_blocks)
        return self._earlier + now

    @property
    def read_bytes(self) -> int:
        """From disk to host memory, so far."""
        return self._read + (self._stream.stats.read_bytes if self._stream else 0)

    @property
    def copied_bytes(self) -> int:
        """From host memory to the device, so far."""
        return self._copied + (self._stream.stats.copied_bytes if self._stream else 0)


def _passes(visits: int, n_blocks: int) -> int:
    return -(-visits // n_blocks)
