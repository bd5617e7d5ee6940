"""When memory or the device fails under a running job: what it was, and what can be done."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import torch

from penstock.errors import DeviceLost, LedgerOverflow

MEMORY_ERRORS = (LedgerOverflow, MemoryError, OSError, RuntimeError)
"""Types among which shortages are found (torch's own are RuntimeErrors)."""


@dataclass(frozen=True)
class Shortage:
    """Memory that ran out. Holds text only: the error's traceback would keep tensors alive.

    Attributes:
        resource: "VRAM", "RAM" or "memory" where both are one.
        message: what was reported.
    """

    resource: str
    message: str


def shortage(error: BaseException, device: torch.device) -> Shortage | None:
    """What ran out, if ``error`` says that memory did.

    Args:
        error: as it was caught.
        device: the job's: on a CPU, the device's memory and the host's are one.
    """
    message = str(error).partition("\n")[0]
    if isinstance(error, LedgerOverflow):
        return Shortage("RAM" if error.memory == "RAM" else "VRAM", message)
    if isinstance(error, torch.OutOfMemoryError):
        return Shortage("VRAM", message)
    if _is_host_shortage(error):
        return Shortage("memory" if device.type == "cpu" else "RAM", message)
    return None


def _is_host_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator has no error class of its own; std::bad_alloc arrives by its name.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "std::bad_alloc" in text
    )


def device_lost(error: BaseException) -> DeviceLost | None:
    """The named error of a device that this process cannot use again, if ``error`` is one.

    After a CUDA error other than out-of-memory every later call of the process fails too ("sticky
    errors", CUDA C++ Programming Guide, "Error Checking").
    """
    if not isinstance(error, torch.AcceleratorError) or isinstance(error, torch.OutOfMemoryError):
        return None
    return DeviceLost(
        "the device has failed",
        expected="a working CUDA context",
        found=str(error).partition("\n")[0],
        remedy="Start penstock again: this process cannot use the device any more.",
    )
