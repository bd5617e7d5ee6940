"""What comparing a pack's blocks with their checksums costs while they are read.

    python -m benchmarks.checked_reads [--blocks 4] [--megabytes 256] [--rounds 7] [--folder DIR]

A file of random blocks is read through the disk tier (direct where the file system allows it), with
and without the comparison, in turns within one run. The ratio is of wall times, with / without: the
median of the rounds' ratios, and their quartiles. Sums are made in the thread that asks for a block
while others read its next pieces, so wall time grows only where no core is idle; CPU seconds a GB,
of all threads together, say what the sums take anywhere. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from penstock.engine.packs.checked import Placed, RunInspector
from penstock.engine.packs.file import PackRun, digest
from penstock.offload.layout import BlockLayout, Extent
from penstock.offload.ledger import ByteLedger
from penstock.offload.mover import Carrier
from penstock.offload.stats import StreamStats
from penstock.offload.tiers import DiskTier, HostTier, open_link
from penstock.units import GIB, MIB


def write_blocks(path: Path, count: int, nbytes: int) -> list[BlockLayout]:
    """Blocks of random bytes one after the other, each to be compared with its checksum."""
    layouts = []
    with path.open("wb") as file:
        for index in range(count):
            data = os.urandom(nbytes)
            file.write(data)
            run = PackRun(f"block {index}", index * nbytes, nbytes, digest(data))
            placed = [Placed(path, run, 0)]
            layouts.append(
                BlockLayout(
                    {},
                    (Extent(path, index * nbytes, nbytes, 0),),
                    {path: None},
                    nbytes,
                    partial(RunInspector, placed),
                )
            )
        os.fsync(file.fileno())
    return layouts


@dataclass(frozen=True)
class Taken:
    """What reading all blocks once took, in seconds, and the part of the bytes read directly."""

    wall: float
    cpu: float
    direct_share: float


def read_all(layouts: list[BlockLayout]) -> Taken:
    """Read all blocks once, one after the other."""
    cpu, nbytes = torch.device("cpu"), layouts[0].nbytes
    disk, stats = DiskTier(), StreamStats()
    with HostTier(ByteLedger("RAM", GIB), cpu).buffers("staging buffer", [nbytes]) as (buffer,):
        buffer.view[:] = bytes(nbytes)  # pages are there before the clocks run
        carrier = Carrier(disk, open_link(cpu, 1), stats)
        wall, busy = time.perf_counter(), time.process_time()
        for layout in layouts:
            carrier.read(layout, buffer)
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    disk.close()
    return Taken(wall, busy, stats.direct_bytes / stats.read_bytes)


def measure(layouts: list[BlockLayout], rounds: int) -> dict[str, object]:
    """Both ways in turns: wall time and CPU seconds a GB, and quartiles of the rounds' ratios."""
    plain = [replace(layout, inspector=None) for layout in layouts]
    pairs = [(read_all(layouts), read_all(plain)) for _ in range(rounds)]
    gigabytes = sum(layout.nbytes for layout in layouts) / 1e9
    low, middle, high = statistics.quantiles((a.wall / b.wall for a, b in pairs), n=4)

    def median(way: int, clock: str) -> float:
        seconds: list[float] = [getattr(pair[way], clock) for pair in pairs]
        return statistics.median(seconds) / gigabytes

    return {
        "bytes": round(gigabytes * 1e9),
        "rounds": rounds,
        "direct_share": pairs[0][0].direct_share,
        "checked_wall_s_per_gb": round(median(0, "wall"), 4),
        "unchecked_wall_s_per_gb": round(median(1, "wall"), 4),
        "checked_cpu_s_per_gb": round(median(0, "cpu"), 4),
        "unchecked_cpu_s_per_gb": round(median(1, "cpu"), 4),
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        layouts = write_blocks(Path(scratch) / "x", options.blocks, options.megabytes * MIB)
        found = measure(layouts, options.rounds)
    print(
        "wall {checked_wall_s_per_gb} s/GB checked, {unchecked_wall_s_per_gb} not; "
        "CPU {checked_cpu_s_per_gb} s/GB checked, {unchecked_cpu_s_per_gb} not; "
        "ratio of wall times {ratio} ({low} to {high})".format(**found)
    )
    cpu = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps(cpu | found))


if __name__ == "__main__":
    main()
