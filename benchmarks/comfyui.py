"""What the nodes cost over ``penstock generate``, and what ComfyUI's process holds of them.

    PENSTOCK_COMFYUI=/path/to/ComfyUI python -m benchmarks.comfyui [--rounds N] [--steps N]

The last line on stdout is JSON. A real ComfyUI (`tests.comfyui.running`) and the command make the
same video in turns, with the model in the box. What is compared is everything beyond the start of a
process: of the node what it takes with its worker started before, in ComfyUI's process and the
worker's; of the command what it takes beyond another that only imports what it runs on. CPU seconds
are what other load does not change; seconds on the wall are told beside them. Memory is that of
ComfyUI's process alone, sampled while its node executes and after, with frames and without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from penstock.engine.request.demo import MINI, demo_picture
from tests.comfyui.running import Comfy

TIMED = {"width": 96, "height": 96, "frames": 17}
HELD = {"width": 384, "height": 384, "frames": 17, "steps": 1}
ASKED = {"prompt": "a cat", "cfg": 4.0, "shift": 5.0}
BUDGETS = {"vram": "1GiB", "ram": "1GiB", "device": "cpu"}
SAMPLE_S = 0.02
STARTS = "import penstock.cli.main, penstock.engine.engine, av, PIL.Image"
"""What the command has imported when it is through."""


def prompt(seed: int, images: bool, shape: dict[str, int]) -> dict[str, Any]:
    """A prompt whose node "3" makes a video; "4" says what it reports, "5" looks at all frames."""
    inputs = {"model": ["1", 0], "start_image": ["2", 0], "seed": seed, "images": images}
    model = {"transformer": "none", "folder": str(MINI)}
    made: dict[str, Any] = {
        "1": {"class_type": "PenstockModel", "inputs": model},
        "2": {"class_type": "LoadImage", "inputs": {"image": "demo.png"}},
        "3": {"class_type": "PenstockGenerate", "inputs": inputs | shape | ASKED | BUDGETS},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    }
    if images:
        saved = {"images": ["3", 0], "filename_prefix": "f"}
        made["5"] = {"class_type": "SaveImage", "inputs": saved}
    return made


def cpu_seconds(comfy: Comfy) -> float:
    """What ComfyUI and its worker have computed so far."""
    every = [psutil.Process(comfy.process.pid), *comfy.workers()]
    return sum(sum(each.cpu_times()[:2]) for each in every)


def executed(comfy: Comfy, asked: dict[str, Any]) -> dict[str, float]:
    """What node "3" takes on the wall, what its engine reports of it, and the prompt's CPU
    seconds."""
    first, before_s = len(comfy.events), cpu_seconds(comfy)
    ended = comfy.run(asked)
    cpu_s = cpu_seconds(comfy) - before_s
    turns = [e for e in comfy.events[first:] if e["type"] == "executing"]
    place = next(i for i, e in enumerate(turns) if e["data"]["node"] == "3")
    seconds = turns[place + 1]["heard_s"] - turns[place]["heard_s"]
    engine_s = float(ended["outputs"]["4"]["text"][0].split()[1])
    return {"node_s": seconds, "node_engine_s": engine_s, "node_cpu_s": cpu_s}


def taken(command: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """Seconds on the wall and CPU seconds of a process."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu_s


def commanded(folder: Path, seed: int, shape: dict[str, int]) -> dict[str, float]:
    """What the command takes for the same, beyond the start of its process."""
    command = [
        sys.executable, "-m", "penstock", "generate", "--model", str(MINI), "--force",
        "--image", str(demo_picture()), "--prompt", str(ASKED["prompt"]), "--seed", str(seed),
        "--cfg", str(ASKED["cfg"]), "--shift", str(ASKED["shift"]), "--steps", str(shape["steps"]),
        "--size", f"{shape['width']}x{shape['height']}", "--frames", str(shape["frames"]),
        "--vram", BUDGETS["vram"], "--ram", BUDGETS["ram"], "--device", BUDGETS["device"],
        "-o", str(folder / "out.mp4"),
    ]  # fmt: skip
    environ = {"OMP_NUM_THREADS": "1", "PENSTOCK_DATA_DIR": str(folder / "jobs")}
    start_s, start_cpu_s = taken([sys.executable, "-c", STARTS], environ)
    seconds, cpu_s = taken(command, environ)
    return {"command_s": seconds - start_s, "command_cpu_s": cpu_s - start_cpu_s}


@contextmanager
def resident(process: psutil.Process) -> Iterator[list[int]]:
    """Samples of a process's resident bytes until the context ends."""
    samples, ended = [process.memory_info().rss], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
        samples.append(process.memory_info().rss)


def held(comfy: Comfy, seed: int, images: bool) -> dict[str, int]:
    """How many bytes ComfyUI's process grows by with a video: while its node executes and frames
    are looked at, and after."""
    process = psutil.Process(comfy.process.pid)
    with resident(process) as samples:
        comfy.run(prompt(seed, images, HELD))
    return {"most": max(samples) - samples[0], "after": samples[-1] - samples[0]}


def main() -> None:
    """Measure, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    timed = TIMED | {"steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        comfy = Comfy(Path(folder) / "base")
        try:
            comfy.run(prompt(0, True, HELD | {"frames": 5}))  # the worker, and ComfyUI's libraries
            rounds = []
            for seed in range(1, args.rounds + 1):
                node = executed(comfy, prompt(seed, False, timed))
                rounds.append(node | commanded(Path(folder), seed, timed))
            video = held(comfy, 101, images=False)
            frames = held(comfy, 102, images=True)
        finally:
            comfy.close()
    row = {
        "benchmark": "comfyui",
        "rounds": args.rounds,
        "steps": args.steps,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **{name: [each[name] for each in rounds] for name in rounds[0]},
        "cpu_ratio": statistics.median(e["node_cpu_s"] / e["command_cpu_s"] for e in rounds),
        "wall_ratio": statistics.median(e["node_s"] / e["command_s"] for e in rounds),
        "frame_bytes": 4 * 3 * math.prod(HELD[name] for name in ("width", "height", "frames")),
        "grown_with_video_alone": video,
        "grown_with_frames": frames,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
