"""When memory or the device fails under a running job: what it was, and what can be done."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import torch

from penstock.errors import DeviceLost, LedgerOverflow, OutOfMemory, PenstockError

MEMORY_ERRORS = (LedgerOverflow, MemoryError, OSError, RuntimeError)
"""Types among which shortages are found (torch's own are RuntimeErrors)."""


_HOST_SIGNS = ("DefaultCPUAllocator", "std::bad_alloc", "can't start new thread")
"""torch's CPU allocator and threads without a stack have no error class of their own."""

_DEVICE_SIGNS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What is allocated past torch's allocator (kernels that are loaded when they are first used, the
handles of libraries) fails with errors of other classes; the device works on."""


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
    """Return what ran out, if ``error`` says that memory did.

    Args:
        error: as it was caught.
        device: the job's: on a CPU, the device's memory and the host's are one.
    """
    message = str(error).partition("\n")[0]
    if isinstance(error, LedgerOverflow):
        return Shortage("RAM" if error.memory == "RAM" else "VRAM", message)
    if _is_device_shortage(error):
        return Shortage("VRAM", message)
    if _is_host_shortage(error):
        return Shortage("memory" if device.type == "cpu" else "RAM", message)
    return None


def _is_device_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _DEVICE_SIGNS)


def _is_host_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _HOST_SIGNS)


def out_of_memory(error: BaseException, device: torch.device) -> OutOfMemory | None:
    """Return the named error of a shortage that ended a job, if ``error`` is one and has no name
    yet."""
    short = None if isinstance(error, PenstockError) else shortage(error, device)
    if short is None:
        return None
    return OutOfMemory(
        "out of memory between the phases, where no smaller plan helps",
        found=short.message,
        remedy="Free memory (close other programs), then continue.",
    )


def _is_device_error(error: BaseException) -> bool:
    """Return torch's name for it: 2.7 has no class yet, only the words."""
    named = getattr(torch, "AcceleratorError", ())
    told = isinstance(error, RuntimeError) and str(error).startswith("CUDA error:")
    return told or isinstance(error, named)


def device_lost(error: BaseException) -> DeviceLost | None:
    """Return the named error of a device that this process cannot use again, if ``error`` is one.

    After a CUDA error other than out-of-memory every later call of the process fails too ("sticky
    errors", CUDA C++ Programming Guide, "Error Checking").
    """
    if not _is_device_error(error) or _is_device_shortage(error):
        return None
    return DeviceLost(
        "the device has failed",
        expected="a working CUDA context",
        found=str(error).partition("\n")[0],
        remedy="Start penstock again: this process cannot use the device any more.",
    )
