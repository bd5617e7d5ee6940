"""What a process takes at most that streams a module straight from its files.

    python -m benchmarks.stream_files [--size 5GiB] [--vram 1GiB] [--ram 1GiB] [--folder DIR]

A file of random bf16 weights is written. A process of its own, from its first line on, makes the
module without weights, streams it by `penstock.stream(..., files=)` and runs it three times; the
kernel tells what it held at most (VmHWM), imports included. Another loads the same module and
streams it then, for comparison. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import resident_peak
from penstock.engine.machine.disk import forget
from penstock.units import GIB, parse_bytes

WIDTH = 4096
PASSES = 3


def main() -> None:
    """Write the file, let both processes run, print what they held."""
    options = parse()
    if options.case is not None:
        print(json.dumps(play(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-files-") as folder:
        path = Path(folder) / "model.safetensors"
        write(path, blocks_of(options.size))
        found = {case: child(options, case, path) for case in ("files", "loaded")}
    report = {
        "benchmark": "stream_files",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "size_bytes": blocks_of(options.size) * WIDTH * WIDTH * 4,
        "vram_bytes": options.vram,
        "ram_bytes": options.ram,
        "passes": PASSES,
        **found,
        "same_output": len({each["output_sha256"] for each in found.values()}) == 1,
    }
    print(json.dumps(report))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Peak memory of streaming from files")
    parser.add_argument("--folder", default=None, help="where the file is written")
    parser.add_argument("--size", type=parse_bytes, default=5 * GIB)
    parser.add_argument("--vram", type=parse_bytes, default=GIB)
    parser.add_argument("--ram", type=parse_bytes, default=GIB)
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def blocks_of(size: int) -> int:
    """How many blocks of two square matrices in bf16 make ``size`` bytes."""
    return -(-size // (WIDTH * WIDTH * 4))


def write(path: Path, blocks: int) -> None:
    """Random weights, in a process of its own memory only block by block."""
    matrix = WIDTH * WIDTH * 2
    header: dict[str, object] = {}
    for n in range(2 * blocks):
        name = f"blocks.{n // 2}.{n % 2 * 2}.weight"
        header[name] = {
            "dtype": "BF16", "shape": [WIDTH, WIDTH],
            "data_offsets": [n * matrix, (n + 1) * matrix],
        }  # fmt: skip
    import torch

    text = json.dumps(header).encode()
    draw = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        values = torch.randn(WIDTH, WIDTH, generator=draw).mul_(0.01).to(torch.bfloat16)
        for n in range(2 * blocks):  # each its own, without drawing them all
            file.write(values.roll(n, 0).view(torch.uint8).numpy().tobytes())
        os.fsync(file.fileno())


def child(options: argparse.Namespace, case: str, path: Path) -> dict[str, object]:
    """One way, in a process of its own."""
    forget(path)
    command = [sys.executable, "-m", "benchmarks.stream_files", "--case", case, "--path", str(path)]
    command += ["--vram", str(options.vram), "--ram", str(options.ram)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def play(options: argparse.Namespace) -> dict[str, object]:
    """Make the module, stream it, run it."""
    import hashlib

    import torch
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from torch import nn

    import penstock

    class Network(nn.Module):
        """Blocks of two matrices beside a residual."""

        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(WIDTH, WIDTH, bias=False), nn.SiLU(),
                    nn.Linear(WIDTH, WIDTH, bias=False),
                )
                for _ in range(blocks)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    with safe_open(str(options.path), "pt") as file:
        count = len(list(file.keys())) // 2
    with init_empty_weights(include_buffers=False):
        module = Network(count)
    files = options.path
    if options.case == "loaded":
        from safetensors.torch import load_file

        module.load_state_dict(load_file(options.path), assign=True)
        files = None
    given = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH).to(torch.bfloat16)
    budgets = {"vram": options.vram, "ram": options.ram, "folder": options.path.parent}
    with penstock.stream(module, "blocks", files=files, **budgets) as streamed, torch.no_grad():
        outputs = [module(given).float() for _ in range(PASSES)]
        report = streamed.report
    assert all(torch.equal(outputs[0], each) for each in outputs)
    return {
        "peak_bytes": resident_peak(),
        "peak_vram_bytes": report.peak_vram_bytes,
        "peak_ram_bytes": report.peak_ram_bytes,
        "read_bytes": report.read_bytes,
        "disk_bytes": report.disk_bytes,
        "output_sha256": hashlib.sha256(outputs[0].numpy().tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
