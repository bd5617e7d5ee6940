"""What a process takes of the machine's memory, and what of it no ledger counts: the interpreter,
the libraries' code and data, and what their allocators keep. Measured by each job, kept, and told
before the next one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.store.durable import FileOps, read_whole, write_atomically
from penstock.errors import JournalError, StorageError
from penstock.folders import data_folder
from penstock.profiles.hardware import control_group
from penstock.units import format_bytes

_NAME = "memory.json"


@dataclass(frozen=True)
class ProcessMemory:
    """The most that a process has taken so far.

    Attributes:
        resident_bytes: of the process itself (peak RSS), whatever it has done before.
        group_bytes: of its control group, page cache and other processes counted; None: no group
            tells it.
    """

    resident_bytes: int
    group_bytes: int | None

    @classmethod
    def peak(cls, root: Path = Path("/")) -> ProcessMemory:
        """Return that of this process.

        Args:
            root: of the file system with ``proc`` and ``sys`` (another one in tests).
        """
        return cls(_peak_resident(root), _group_peak(root))


def resident_bytes() -> int:
    """Return what this process has resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_resident(root: Path) -> int:
    try:
        lines = (root / "proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return _peak_elsewhere()


def _peak_elsewhere() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # getrusage(2): bytes there, KiB else


def _group_peak(root: Path) -> int | None:
    folder = control_group(root)
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        try:
            return None if folder is None else int((folder / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def keep_overhead(device: str, nbytes: int) -> None:
    """Keep what a job's process took besides its buffers, for the next one's plan.

    Args:
        device: "cpu" or "cuda": the libraries of a GPU take more.
        nbytes: of host memory.
    """
    place, ops = data_folder() / _NAME, FileOps()
    try:
        ops.mkdir(place.parent)
        known = _known() | {device: nbytes}
        write_atomically(ops, place, [json.dumps(known).encode()], "own")
    except (OSError, StorageError):
        return  # the next plan says less


def known_overhead(device: str) -> int | None:
    """Return what the last job on such a device took besides its buffers on this machine; None:
    none has been measured."""
    return _known().get(device)


def _known() -> dict[str, int]:
    try:
        value = json.loads(read_whole(FileOps(), data_folder() / _NAME) or b"{}")
    except (JournalError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {str(key): each for key, each in value.items() if type(each) is int and each > 0}


def overhead_told(device: str, buffers_bytes: int | None = None) -> str:
    """Return what comes on top of ``--ram``, in a clause.

    Args:
        device: "cpu" or "cuda".
        buffers_bytes: of host memory at most, where they are planned: the sum is told then.
    """
    known = known_overhead(device)
    if known is None:
        return (
            "the interpreter and libraries come on top (how much is measured by the first job on "
            "this machine)"
        )
    told = (
        f"the interpreter and libraries take about {format_bytes(known)} on top (measured by the "
        "last job on this machine)"
    )
    if buffers_bytes is None:
        return told
    return f"{told}, the process about {format_bytes(buffers_bytes + known)} of RAM in all"
