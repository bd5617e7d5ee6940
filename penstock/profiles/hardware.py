"""What a machine has: bytes, bytes a second, operations a second. `probe` is the only query."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.units import GIB, MIB

_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)

CPU_RESERVE_BYTES = 2 * GIB
"""Host memory left to the system and the interpreter when a budget is chosen automatically."""

CUDA_RESERVE_BYTES = 700 * MIB
"""Free VRAM left to the CUDA context, cuBLAS workspaces and the display, likewise."""


@dataclass(frozen=True)
class Hardware:
    """A machine as the planner sees it.

    Attributes:
        device: "cuda" or "cpu".
        vram_bytes: free on the device (on a CPU: what the device tier may take of the RAM).
        ram_bytes: free host memory, cgroup limits counted.
        flops: operations a second of matrix products in the compute dtype, attainable.
        copy_bytes_per_s: host memory to device.
        read_bytes_per_s: disk to host memory.
    """

    device: str
    name: str
    vram_bytes: int
    ram_bytes: int
    flops: float
    copy_bytes_per_s: float
    read_bytes_per_s: float


def available_ram_bytes() -> int:
    """Free host memory: the least of what the machine and its control group have left."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit_file, used_file in _CGROUP_LIMITS:
        try:
            limit, used = limit_file.read_text().strip(), int(used_file.read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, max(0, int(limit) - used))
    return free


def probe(device: str) -> Hardware:
    """The machine this runs on. ``device`` is "cuda" or "cpu".

    The rates are cautious defaults until they are measured.
    """
    ram_bytes = max(0, available_ram_bytes() - CPU_RESERVE_BYTES)
    if device == "cpu":
        half = ram_bytes // 2
        return Hardware("cpu", "CPU", half, ram_bytes - half, 1e11, 5e9, 1e9)
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    return Hardware(
        device="cuda",
        name=torch.cuda.get_device_name(),
        vram_bytes=max(0, free_bytes - CUDA_RESERVE_BYTES),
        ram_bytes=ram_bytes,
        flops=4e13,
        copy_bytes_per_s=1.2e10,
        read_bytes_per_s=2e9,
    )
