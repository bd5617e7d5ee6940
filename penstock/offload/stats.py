"""What a stream moved and who waited for whom: counted while it runs, read off as a value."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from threading import Lock
from typing import Any, TypeVar

_Sum = TypeVar("_Sum", bound="_Summable")


@dataclass(frozen=True)
class _Summable:
    """Figures that are added, and subtracted, field by field."""

    def __add__(self: _Sum, other: _Sum) -> _Sum:
        return type(self)(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __sub__(self: _Sum, other: _Sum) -> _Sum:
        return type(self)(*(a - b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(figures: _Summable) -> list[Any]:
    return [getattr(figures, each.name) for each in fields(figures)]


@dataclass(frozen=True)
class Edge(_Summable):
    """One of the three edges that weights pass, over some time.

    Attributes:
        nbytes: that passed it.
        busy_s: seconds in which it worked: reading, copying, computing.
        starved_s: seconds in which it waited for the edge before it: the stall.
        blocked_s: seconds in which it waited for room: a free staging buffer, a free slot. What
            comes after it is slower, which does no harm.
    """

    nbytes: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0
    blocked_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Rate while it worked (0.0: it did not)."""
        return self.nbytes / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(frozen=True)
class Flow(_Summable):
    """What passed the edges of one stream, or of several, residents included.

    Differences of two flows of a stream are the flow between the two moments. On CUDA, copies and
    computations are timed by the device's own clock, and count once the device has passed them.

    Attributes:
        disk_to_host: reads into staging buffers and resident places.
        host_to_device: copies into slots and resident places.
        device_to_compute: visits; ``starved_s`` is the stall of the computation.
        direct_bytes: read around the page cache.
        pageable_bytes: host buffers that the CUDA driver refused to pin.
    """

    disk_to_host: Edge = Edge()
    host_to_device: Edge = Edge()
    device_to_compute: Edge = Edge()
    direct_bytes: int = 0
    pageable_bytes: int = 0


@dataclass
class StreamStats:
    """The running counters of a stream; `flow` reads them off. Every field only grows.

    Attributes:
        read_bytes: from disk to host memory.
        direct_bytes: those of them that went around the page cache.
        copied_bytes: from host memory to the device.
        visited_bytes: that were computed with.
        pageable_bytes: host buffers that the CUDA driver refused to pin.
        read_s: seconds in which the disk was reading.
        copy_s: seconds in which the link was copying.
        compute_s: seconds in which the computation worked, between two waits for blocks.
        staging_wait_s: reading waited for a free staging buffer.
        disk_wait_s: copying waited for a read (disk -> host is too slow).
        slot_wait_s: copying waited for a free slot; on CUDA, for its last use to be issued.
        compute_wait_s: the computation waited for a block (host -> device is too slow); on CUDA, by
            the device's own clock.
    """

    read_bytes: int = 0
    direct_bytes: int = 0
    copied_bytes: int = 0
    visited_bytes: int = 0
    pageable_bytes: int = 0
    read_s: float = 0.0
    copy_s: float = 0.0
    compute_s: float = 0.0
    staging_wait_s: float = 0.0
    disk_wait_s: float = 0.0
    slot_wait_s: float = 0.0
    compute_wait_s: float = 0.0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, name: str, amount: float) -> None:
        """Add to one of the counters, from any thread."""
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)

    def flow(self) -> Flow:
        """Return the counters as they stand."""
        with self._lock:
            return self._flow()

    def _flow(self) -> Flow:
        return Flow(
            Edge(self.read_bytes, self.read_s, 0.0, self.staging_wait_s),
            Edge(self.copied_bytes, self.copy_s, self.disk_wait_s, self.slot_wait_s),
            Edge(self.visited_bytes, self.compute_s, self.compute_wait_s, 0.0),
            self.direct_bytes,
            self.pageable_bytes,
        )
