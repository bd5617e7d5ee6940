"""Most memory that `inspect` and `pack` take, each measured in a process of its own under a limit.

    python -m benchmarks.pack_memory [--layers 24] [--format int8] [--ram 128MiB] [--folder DIR]

`inspect` describes a file of the official I2V 14B's header and size; `pack` packs a transformer of
``--layers`` blocks, 2048 wide (24: 3 GB in fp16). Both files are holes, so they take no disk; the
pack does, and is removed. What the system then lets the process allocate (RLIMIT_DATA) is the RAM
budget; the figure is the growth of the peak that the kernel counted (VmHWM), libraries not
included. Linux only. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock.engine.families.wan.kinds import KINDS
from penstock.units import MIB, format_bytes, parse_bytes
from tests.engine import test_inspect
from tests.engine.packs import test_pack_memory


def child(code: str, *arguments: str) -> dict[str, Any]:
    """What ``code`` prints last, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def inspected(folder: Path) -> dict[str, Any]:
    """The whole process, Python included: `inspect` loads no torch."""
    tensors = {name: ("F16", shape) for name, shape in test_inspect.original_14b().items()}
    path = test_inspect.write_sparse(folder / "14b.safetensors", tensors)
    found = child(test_inspect.CHILD, str(path))
    return {
        "file_bytes": path.stat().st_size,
        "limit_bytes": 200 * MIB,
        "peak_bytes": round(found["peak_mb"] * MIB),
        "seconds": round(found["seconds"], 3),
    }


def packed(folder: Path, layers: int, wanted: str, ram_bytes: int) -> dict[str, Any]:
    """What packing takes beside the libraries."""
    shapes = KINDS["transformer"].shapes(test_pack_memory.CONFIG | {"num_layers": layers})
    path = test_inspect.write_sparse(
        folder / "x.safetensors", {name: ("F16", shape) for name, shape in shapes.items()}
    )
    (folder / "out").mkdir()
    target, start = folder / "out" / "p.safetensors", time.perf_counter()
    found = child(test_pack_memory.CHILD, str(path), str(target), wanted, str(ram_bytes))
    return {
        "file_bytes": path.stat().st_size,
        "pack_bytes": target.stat().st_size,
        "format": wanted,
        "budget_bytes": ram_bytes,
        "peak_bytes": found["taken"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--format", default="int8")
    parser.add_argument("--ram", type=parse_bytes, default=128 * MIB)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        inspect = inspected(folder)
        print(f"inspect: {format_bytes(inspect['peak_bytes'])}")
        pack = packed(folder, options.layers, options.format, options.ram)
        print(f"pack: {format_bytes(pack['peak_bytes'])}")
    print(json.dumps({"cores": os.cpu_count(), "inspect": inspect, "pack": pack}))


if __name__ == "__main__":
    main()
