"""Which GPU is meant: "cuda" is the calling thread's current one, and every thread has its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def indexed(device: torch.device) -> torch.device:
    """Return ``device`` by its index, as tensors name theirs: a GPU without one is the current
    one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Until the context ends, "cuda" means ``device`` on this thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
