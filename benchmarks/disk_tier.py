"""How fast blocks come from disk: our stream beside plain sequential direct reads of the same file.

    python -m benchmarks.disk_tier [--folder DIR] [--size 2GiB] [--block 300MiB] [--rounds 3]

A file of random blocks is written and removed again. Each round reads it whole both ways, the order
changing from round to round, nothing in the page cache. "raw" is a file as users have it (its data
begins anywhere), "pack" one whose data begins on a page, as penstock writes them. The computation
is empty, so that the disk is what is measured. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from penstock.offload.checkpoint import Checkpoint
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Residency
from penstock.offload.streamer import BlockStream
from penstock.units import GIB, MIB, align_up, parse_bytes

PLAIN_READ_BYTES = 16 * MIB
TENSORS = 20


def main() -> None:
    """Measure, print a table, and the same as JSON."""
    arguments = parse()
    results = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="penstock-disk-") as folder:
        for kind in ("raw", "pack"):
            path = Path(folder) / f"{kind}.safetensors"
            blocks = max(1, arguments.size // arguments.block)
            write_file(path, blocks, arguments.block, on_page=kind == "pack")
            results[kind] = measure(path, blocks, arguments.rounds)
            path.unlink()
            print(
                f"{kind}: stream {results[kind]['stream_gb_per_s']:.2f} GB/s, plain direct reads "
                f"{results[kind]['plain_gb_per_s']:.2f} GB/s, ratio {results[kind]['ratio']:.3f}"
            )
    report = {
        "benchmark": "disk_tier",
        "size_bytes": arguments.size,
        "block_bytes": arguments.block,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        **results,
    }
    print(json.dumps(report))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Read rate of the disk tier")
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written")
    parser.add_argument("--size", type=parse_bytes, default=2 * GIB)
    parser.add_argument("--block", type=parse_bytes, default=300 * MIB)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def write_file(path: Path, blocks: int, block_bytes: int, *, on_page: bool) -> None:
    """A safetensors file of ``blocks`` blocks, written past the page cache's memory."""
    tensor_bytes = align_up(block_bytes // TENSORS, 4096)
    header = {}
    for number in range(blocks * TENSORS):
        begin = number * tensor_bytes
        header[f"blocks.{number // TENSORS}.tensor{number % TENSORS}"] = {
            "dtype": "U8",
            "shape": [tensor_bytes],
            "data_offsets": [begin, begin + tensor_bytes],
        }
    text = json.dumps(header).encode()
    end = 4096 if on_page else 64
    text += b" " * (align_up(len(text) + 8, end) - len(text) - 8 + (0 if on_page else 8))
    noise = os.urandom(tensor_bytes)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            file.write(noise)
        file.flush()
        os.fsync(file.fileno())
    forget(path)


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: Path, blocks: int, rounds: int) -> dict[str, object]:
    """Seconds of both ways, round by round, and the median of the rounds' ratios."""
    layouts = layouts_of(path, blocks)
    nbytes = sum(layout.read_bytes for layout in layouts)
    stream_s, plain_s, direct = [], [], 0
    for number in range(rounds):
        for way in ("stream", "plain") if number % 2 else ("plain", "stream"):
            forget(path)
            if way == "plain":
                plain_s.append(read_plain(path))
            else:
                seconds, direct = read_stream(layouts)
                stream_s.append(seconds)
    ratios = [plain / stream for plain, stream in zip(plain_s, stream_s, strict=True)]
    return {
        "blocks": blocks,
        "bytes": nbytes,
        "direct_share": direct / nbytes,
        "stream_s": stream_s,
        "plain_s": plain_s,
        "stream_gb_per_s": nbytes / statistics.median(stream_s) / 1e9,
        "plain_gb_per_s": nbytes / statistics.median(plain_s) / 1e9,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def layouts_of(path: Path, blocks: int) -> list[BlockLayout]:
    """One layout a block."""
    with Checkpoint.open(path) as checkpoint:
        return [
            BlockLayout.from_entries(
                {name: e for name, e in checkpoint.items() if name.startswith(f"blocks.{index}.")}
            )
            for index in range(blocks)
        ]


def read_stream(layouts: list[BlockLayout]) -> tuple[float, int]:
    """Seconds of one pass over all blocks, its cold start included, and bytes read directly."""
    largest = max(layout.nbytes for layout in layouts)
    residency = Residency(len(layouts), device_slots=2, staging_buffers=2)
    stream = BlockStream(
        layouts,
        residency,
        passes=1,
        device=torch.device("cpu"),
        device_ledger=ByteLedger("VRAM", 2 * largest),
        host_ledger=ByteLedger("RAM", 2 * largest),
    )
    began = time.perf_counter()
    with stream:
        for _ in stream.forward_pass():
            pass
        seconds = time.perf_counter() - began
    return seconds, stream.stats.direct_bytes


def read_plain(path: Path) -> float:
    """Seconds of reading the file from end to end, one large direct read after the other."""
    buffer = memoryview(mmap.mmap(-1, PLAIN_READ_BYTES))
    buffer[:] = bytes(PLAIN_READ_BYTES)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        began, offset = time.perf_counter(), 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count
        return time.perf_counter() - began
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
