"""What a machine has: bytes, bytes a second, operations a second. `default_device` and `probe` are
the only queries.

Rates are those that `penstock doctor` measured and stored, or else cautious assumptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from penstock.profiles.gpu_sign import shows_gpu
from penstock.profiles.rates import Rates, stored_rates
from penstock.units import GIB, MIB

CPU = "CPU"
"""What a machine without a GPU is called in plans."""

CPU_RESERVE_BYTES = 2 * GIB
"""Host memory left to the system and the interpreter when a budget is chosen automatically."""

CUDA_RESERVE_BYTES = 700 * MIB
"""Free VRAM left to the CUDA context, the kernels that libraries load, and the display, likewise.
On an H200 the context takes 619 MiB and the kernels 148 (`benchmarks.gpu_suite`); the context of a
card with a quarter of its multiprocessors is smaller."""

FUSED_NORMS_SINCE = (2, 9)
"""The torch whose RMS norm is one kernel on CUDA."""

INTERPRETER_BYTES = 1 * GIB
"""Python, torch and the libraries' code, which no ``--ram`` counts."""

SYSTEM_BYTES = 3 * GIB
"""The operating system and the desktop, where a machine is described instead of measured."""

_ASSUMED_CPU = Rates(1e11, 5e9, 1e9)
_ASSUMED_CUDA = Rates(4e13, 1.2e10, 2e9, conv_flops=2e13, memory_bytes_per_s=3e11)


@dataclass(frozen=True)
class Hardware:
    """A machine as the planner sees it.

    Attributes:
        device: "cuda" or "cpu".
        vram_bytes: free on the device (on a CPU: what the device tier may take of the RAM).
        ram_bytes: free host memory, cgroup limits counted.
        rates: what it computes and moves a second.
        rates_source: where those figures come from.
        fused_norms: an RMS norm is one kernel there, and makes nothing but its result.
        index: of the GPU that was asked: every thread has a current one of its own.
    """

    device: str
    name: str
    vram_bytes: int
    ram_bytes: int
    rates: Rates
    rates_source: str = "assumed"
    fused_norms: bool = False
    index: int | None = None

    @property
    def place(self) -> str:
        """The device as torch names it, by its index where that is known: "cuda:1"."""
        return self.device if self.index is None else f"{self.device}:{self.index}"


def available_ram_bytes(root: Path = Path("/")) -> int:
    """Free host memory: the least of what the machine and its control groups have left.

    Args:
        root: of the file system with ``proc`` and ``sys`` (another one in tests).
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    return min([free, *_cgroup_free(root)])


def _cgroup_free(root: Path) -> Iterator[int]:
    """Yield what each control group of this process has left; page cache that can go counts as
    free."""
    for folder in _cgroup_folders(root):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = (folder / limit_name).read_text().strip()
                used = int((folder / used_name).read_text())
            except (OSError, ValueError):
                continue
            if limit.isdigit():
                yield max(0, int(limit) - max(0, used - _inactive_cache_bytes(folder)))


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's memory group and of all above it, version 2 and version
    1."""
    base = root / "sys/fs/cgroup"
    yield base
    yield base / "memory"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = base / "memory" if controllers else base
        for part in Path(path).parts[1:]:
            folder /= part
            yield folder


def control_group(root: Path = Path("/")) -> Path | None:
    """Return the folder of this process's own memory group; None where there is none.

    Args:
        root: as of `available_ram_bytes`.
    """
    folders = [folder for folder in _cgroup_folders(root) if folder.is_dir()]
    return folders[-1] if folders else None


def _inactive_cache_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in lines if " " in line)
    value = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def default_device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu". torch is asked where there is a sign of one."""
    if not shows_gpu():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def probe(device: str) -> Hardware:
    """Return the machine this runs on, with what it has free now. ``device`` is "cuda" or "cpu"."""
    ram_bytes = max(0, available_ram_bytes() - CPU_RESERVE_BYTES)
    if device == "cpu":
        half = ram_bytes // 2
        return _rated("cpu", CPU, half, ram_bytes - half, _ASSUMED_CPU)
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    room = max(0, free_bytes - CUDA_RESERVE_BYTES)
    found = _rated("cuda", name, room, ram_bytes, _ASSUMED_CUDA)
    return replace(found, index=torch.cuda.current_device())


def has_fused_norms(device: str) -> bool:
    """Return whether the torch that is installed normalises in one kernel on ``device``."""
    if device != "cuda":
        return False
    try:
        numbers = re.match(r"(\d+)\.(\d+)", metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= FUSED_NORMS_SINCE


def _rated(device: str, name: str, vram_bytes: int, ram_bytes: int, assumed: Rates) -> Hardware:
    measured = stored_rates(name)
    source = "assumed" if measured is None else "measured by penstock doctor"
    rates, fused = measured or assumed, has_fused_norms(device)
    return Hardware(device, name, vram_bytes, ram_bytes, rates, source, fused)
