"""How soon two commands do something, beside an earlier build: CPU seconds, in pairs.

- ``demo``: ``penstock demo`` as a whole, children included; whether its frames are the same.
- ``generate``: ``penstock generate`` with its model in the box, from its start to the first
  denoising step, children that have ended included. It is ended there.

Each pair is the earlier build and this one, one right after the other, so that what the machine
does besides falls on both; the figure is the median of the pairs' ratios. Both run with one thread
and the bytecode of their files written before. The earlier build is a checkout, such as one of
``git worktree add ../earlier COMMIT``. Linux only. The last line on stdout is JSON.

    python -m benchmarks.start_up --old ../earlier [--pairs 5]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, cast

import av

HERE = Path(__file__).resolve().parent.parent
ASSETS = Path("penstock", "assets")
FIRST_STEP = "denoise: "
REQUEST = ("--prompt", "a red disc moves to the left", "--steps", "40", "--seed", "1")


def environment(build: Path) -> dict[str, str]:
    """Of a command that runs from the checkout ``build``."""
    return os.environ | {"PYTHONPATH": str(build), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    """``penstock`` with these arguments."""
    return [sys.executable, "-m", "penstock", *arguments]


def demo(build: Path, output: Path) -> tuple[float, str]:
    """CPU seconds of the whole command, and its frames' digest."""
    before = os.times()
    subprocess.run(
        command("demo", "-o", str(output), "--force"),
        env=environment(build), cwd=output.parent, check=True, capture_output=True,
    )  # fmt: skip
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])
    digest = hashlib.sha256()
    with av.open(str(output)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="rgb24").tobytes())
    return seconds, digest.hexdigest()


def generate(build: Path, output: Path) -> float:
    """CPU seconds until the first denoising step begins."""
    arguments = (
        "generate",
        "--model",
        str(build / ASSETS / "mini"),
        "--image",
        str(build / ASSETS / "demo.png"),
    )
    with subprocess.Popen(
        command(*arguments, *REQUEST, "-o", str(output), "--force"),
        env=environment(build), cwd=output.parent, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        told = []
        for line in cast("IO[str]", child.stderr):
            told.append(line)
            if line.startswith(FIRST_STEP):
                seconds = cpu_seconds(child.pid)
                child.kill()
                return seconds
    raise SystemExit("".join(told))


def cpu_seconds(pid: int) -> float:
    """Of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measured(old: Path, pairs: int, folder: Path) -> dict[str, object]:
    """All pairs."""
    output = folder / "x.mp4"
    found: dict[str, list[dict[str, float]]] = {"demo": [], "generate": []}
    digests = set()
    for build in (old, HERE):  # not counted: bytecode and file caches
        demo(build, output)
    for _ in range(pairs):
        (before, first), (now, second) = demo(old, output), demo(HERE, output)
        digests |= {first, second}
        found["demo"].append({"old": before, "new": now})
        before, now = generate(old, output), generate(HERE, output)
        found["generate"].append({"old": before, "new": now})
    return {
        "demo_frames_equal": len(digests) == 1,
        **{
            name: {
                "old_s": statistics.median(pair["old"] for pair in runs),
                "new_s": statistics.median(pair["new"] for pair in runs),
                "ratio": statistics.median(pair["new"] / pair["old"] for pair in runs),
                "pairs": runs,
            }
            for name, runs in found.items()
        },
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the earlier build")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options.old.resolve(), options.pairs, Path(folder))
    for name in ("demo", "generate"):
        print(name, {key: found[name][key] for key in ("old_s", "new_s", "ratio")})  # type: ignore[index]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
