"""What comparing a pack's blocks with their checksums costs while they are read.

    python -m benchmarks.checked_reads [--blocks 8] [--megabytes 256] [--rounds 5] [--folder DIR]

A file of random blocks is read through the disk tier (direct where the file system allows it), with
and without the comparison, in turns within one run; the ratio is of median seconds, with / without.
The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from penstock.engine.checked import Placed, RunInspector
from penstock.engine.packfile import PackRun, digest
from penstock.offload.layout import BlockLayout, Extent
from penstock.offload.ledger import ByteLedger
from penstock.offload.mover import Carrier, StreamStats
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
                    lambda placed=placed: RunInspector(placed),
                )
            )
        os.fsync(file.fileno())
    return layouts


def seconds(layouts: list[BlockLayout]) -> tuple[float, float]:
    """Wall time of reading all blocks once, and the part of the bytes that was read directly."""
    cpu, nbytes = torch.device("cpu"), layouts[0].nbytes
    disk, stats = DiskTier(), StreamStats()
    with HostTier(ByteLedger("RAM", GIB), cpu).buffers("slab", [nbytes]) as (slab,):
        slab.view[:] = bytes(nbytes)  # pages are there before the clock runs
        carrier = Carrier(disk, open_link(cpu, 1), stats)
        start = time.perf_counter()
        for layout in layouts:
            carrier.read(layout, slab)
        taken = time.perf_counter() - start
    disk.close()
    return taken, stats.direct_bytes / stats.read_bytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        layouts = write_blocks(Path(scratch) / "x", options.blocks, options.megabytes * MIB)
        plain = [replace(layout, inspector=None) for layout in layouts]
        pairs = [(seconds(layouts), seconds(plain)) for _ in range(options.rounds)]
    checked = statistics.median(one[0] for one, _ in pairs)
    unchecked = statistics.median(other[0] for _, other in pairs)
    total = options.blocks * options.megabytes * MIB
    print(f"checked {total / checked / 1e9:.2f} GB/s, unchecked {total / unchecked / 1e9:.2f} GB/s")
    print(
        json.dumps(
            {
                "cpu": platform.processor() or platform.machine(),
                "bytes": total,
                "direct_share": pairs[0][0][1],
                "checked_s": round(checked, 3),
                "unchecked_s": round(unchecked, 3),
                "ratio": round(checked / unchecked, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
