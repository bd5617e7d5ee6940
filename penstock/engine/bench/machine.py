"""The machine a benchmark ran on: facts to compare results by, and what its links reach."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from penstock.engine.bench.result import Links
from penstock.engine.machine.calibrate import Effort, copy_rate
from penstock.engine.machine.disk import IN_FLIGHT, read_rate
from penstock.engine.machine.programs import nvidia_smi, output
from penstock.engine.software import versions
from penstock.units import MIB

SAMPLE_BYTES = 1024 * MIB
"""Read from the model's file to know what the disk reaches."""

_QUERY = ("driver_version", "pcie.link.gen.max", "pcie.link.width.max")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the GPU, driver, PCIe, CPU, memory, control group, versions and commit; None: not
    known."""
    import psutil

    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ram_bytes": int(psutil.virtual_memory().total),
        "cgroup_bytes": _cgroup_limit(),
        "versions": versions(),
        "commit": commit(),
    }
    return facts | _gpu(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _cgroup_limit() -> int | None:
    """Return the control group's ceiling on memory, where there is one below the machine's."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None}
    found = nvidia_smi(device, _QUERY)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "vram_bytes": int(torch.cuda.get_device_properties(device).total_memory),
        "cuda": torch.version.cuda,
        "driver": found.get("driver_version"),
        "pcie_generation": found.get("pcie.link.gen.max"),
        "pcie_lanes": found.get("pcie.link.width.max"),
    }


def commit() -> str | None:
    """Return the commit of the working tree that the package is in, with a mark where it was
    changed since."""
    here = ("git", "-C", str(Path(__file__).parent))
    commit = output(*here, "rev-parse", "HEAD").strip()
    if not commit:
        return None
    return commit + (" (changed)" if output(*here, "status", "--porcelain").strip() else "")


def links(device: torch.device, file: Path, sample_bytes: int = SAMPLE_BYTES) -> Links:
    """Return what disk and link reach with nothing else going on.

    Args:
        file: of the model, whose reads are measured.
        sample_bytes: the most that is read of it, each way.
    """
    nbytes = min(sample_bytes, file.stat().st_size)
    return Links(
        read_bytes_per_s=read_rate(file, nbytes, IN_FLIGHT),
        plain_read_bytes_per_s=read_rate(file, nbytes, 1),
        copy_bytes_per_s=copy_rate(device, Effort.on(device)),
    )
