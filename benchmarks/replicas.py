"""Wall time of a list of requests on two workers beside that on one, of one run on this machine.

The two take turns (one, two, two, one, ...), so that what else the machine does meets both.
Each worker computes with one thread. The lists are made by ``penstock batch`` as users start it:
start-up, imports, checks and planning are inside the times. The last line on stdout is JSON.

    python -m benchmarks.replicas [--ray] [--jobs 20] [--steps 40] [--rounds 2]
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

from penstock.engine.request.demo import DEMO_PROMPT, MINI, demo_picture

ONE, TWO = "cpu", "cpu,cpu"


def write_list(folder: Path, jobs: int, steps: int) -> Path:
    """A list of the demo's request with other seeds."""
    line = {"prompt": DEMO_PROMPT, "image": str(demo_picture()), "steps": steps}
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(line | {"seed": seed}) + "\n" for seed in range(jobs)))
    return path


def timed(requests: Path, output: Path, devices: str, *flags: str) -> float:
    """Seconds that the whole command takes; every line must have been made."""
    command = [
        sys.executable, "-m", "penstock", "batch", str(requests), "-o", str(output),
        "--model", str(MINI), "--vram", "256MiB", "--ram", "512MiB", "--devices", devices,
        "--json", *flags,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["made"] == told["requests"], told
    return seconds


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", action="store_true", help="workers are Ray's actors")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="lists that each of them makes")
    asked = parser.parse_args()
    flags = ("--ray", "local") if asked.ray else ()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        requests = write_list(folder, asked.jobs, asked.steps)
        seconds: dict[str, list[float]] = {ONE: [], TWO: []}
        for number in range(asked.rounds):
            for devices in (ONE, TWO) if number % 2 == 0 else (TWO, ONE):
                output = folder / f"{number}-{devices}"
                seconds[devices].append(timed(requests, output, devices, *flags))
    one_s, two_s = sum(seconds[ONE]), sum(seconds[TWO])
    shown = {devices: [round(each, 1) for each in found] for devices, found in seconds.items()}
    print(f"{asked.jobs} requests of {asked.steps} steps, {asked.rounds} times: {shown} s;")
    print(f"two workers take {two_s / one_s:.3f} of one's time, on {os.cpu_count()} cores")
    told = {"jobs": asked.jobs, "steps": asked.steps, "rounds": asked.rounds, "ray": asked.ray}
    print(json.dumps(told | {"ratio": two_s / one_s, "one_s": one_s, "two_s": two_s}))


if __name__ == "__main__":
    main()
