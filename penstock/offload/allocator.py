"""The ceiling on torch's own CUDA allocator: what the ledgers promise, the driver enforces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allocator_capped(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """Let torch's allocator hold no more than ``limit_bytes`` on ``device`` until the context ends.

    Beyond it torch raises its out-of-memory error instead of letting the driver spill into system
    memory. The ceiling is the process's own: of two jobs at once, the later one's holds. On a CPU
    nothing happens.
    """
    if device.type != "cuda":
        yield
        return
    # torch takes no device without an index here.
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
