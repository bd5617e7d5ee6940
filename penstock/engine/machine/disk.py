"""What a disk reaches: direct reads of a file, past the page cache."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from penstock.offload.files import WeightFile
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import HostTier
from penstock.units import MIB

IN_FLIGHT = 4
"""Requests at a time, as a stream keeps several: one does not fill an NVMe disk's queue."""

_PIECE = 8 * MIB


def read_rate(file: Path, nbytes: int, in_flight: int) -> float:
    """Return the bytes a second of direct reads of the first ``nbytes``, so many requests at a
    time."""
    forget(file)
    ledger, cpu = ByteLedger("measuring", 1 << 62), torch.device("cpu")
    with (
        HostTier(ledger, cpu).buffers("targets", [_PIECE] * in_flight) as buffers,
        WeightFile(file, direct=True) as weights,
        ThreadPoolExecutor(in_flight) as pool,
    ):
        for buffer in buffers:  # no page is touched for the first time while the clock runs
            buffer.tensor.zero_()

        def read(which: int) -> None:
            for offset in range(which * _PIECE, nbytes, in_flight * _PIECE):
                view = buffers[which].view[: min(_PIECE, nbytes - offset)]
                weights.read_into(view, offset, on_page=True)

        started = time.perf_counter()
        list(pool.map(read, range(in_flight)))
        return nbytes / (time.perf_counter() - started)


def forget(file: Path) -> None:
    """Drop ``file`` from the page cache, where the platform can."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
