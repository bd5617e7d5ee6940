"""The ceiling on torch's own CUDA allocator: what the ledgers promise, the driver enforces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from penstock.offload.device import indexed
from penstock.offload.tiers import release_cached


@dataclass
class _Ceiling:
    """Of this process on one GPU: torch has one allocator, whoever uses it.

    Attributes:
        share: what others had set; it comes back at the end.
        held_bytes: what the allocator held for others; no budget of ours counts it.
        limits_bytes: of everyone who is under way.
    """

    share: float
    held_bytes: int
    limits_bytes: list[int] = field(default_factory=list)

    @classmethod
    def over(cls, index: int) -> _Ceiling:
        """Return one over what there is, and new peaks."""
        release_cached(torch.device("cuda", index))  # what is cached is nobody's
        torch.cuda.reset_peak_memory_stats(index)
        known: Callable[[int], float] | None = getattr(
            torch.cuda.memory, "get_per_process_memory_fraction", None
        )
        return cls(1.0 if known is None else known(index), torch.cuda.memory_reserved(index))

    def apply(self, index: int) -> None:
        """Tell torch."""
        total = torch.cuda.get_device_properties(index).total_memory
        share = (self.held_bytes + sum(self.limits_bytes)) / total
        share = min(self.share, share) if self.limits_bytes else self.share
        torch.cuda.set_per_process_memory_fraction(share, index)


_ceilings: dict[int, _Ceiling] = {}
_changing = threading.Lock()


@contextmanager
def allocator_capped(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """Let torch's allocator take no more than ``limit_bytes`` on ``device`` until the context ends.

    Beyond it torch raises its out-of-memory error instead of letting the driver spill into system
    memory. The ceiling is the process's own: it is over what the allocator held before, and of two
    jobs at once it is the sum of theirs. The allocator's peaks begin anew with the first. On a CPU
    nothing happens.
    """
    if device.type != "cuda":
        yield
        return
    index = indexed(device).index  # torch takes no device without one here
    with _changing:
        ceiling = _ceilings[index] = _ceilings.get(index) or _Ceiling.over(index)
        ceiling.limits_bytes.append(limit_bytes)
        ceiling.apply(index)
    try:
        yield
    finally:
        with _changing:
            ceiling.limits_bytes.remove(limit_bytes)
            ceiling.apply(index)
            if not ceiling.limits_bytes:
                del _ceilings[index]
