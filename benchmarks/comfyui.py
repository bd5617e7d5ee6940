"""What the nodes cost over ``penstock generate``, and what ComfyUI's process holds of them.

    PENSTOCK_COMFYUI=/path/to/ComfyUI python -m benchmarks.comfyui [--rounds N]

The last line on stdout is JSON. A real ComfyUI (`tests.comfyui.running`) and the command make the
same video in turns, with the model in the box. Of a node it counts how long ComfyUI says that it
executes, with its worker started before; of the command what its report says, which begins after
its process has: so what is compared is everything beyond the start of a process. Memory is that of
ComfyUI's process alone, sampled while its node executes and after, with frames and without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from penstock.engine.request.demo import MINI, demo_picture
from tests.comfyui.running import Comfy

TIMED = {"width": 96, "height": 96, "frames": 17, "steps": 30}
HELD = {"width": 384, "height": 384, "frames": 17, "steps": 1}
ASKED = {"prompt": "a cat", "cfg": 4.0, "shift": 5.0}
BUDGETS = {"vram": "1GiB", "ram": "1GiB", "device": "cpu"}
SAMPLE_S = 0.02


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


def executed(comfy: Comfy, asked: dict[str, Any]) -> tuple[float, float]:
    """Seconds that node "3" executes, and those that its engine reports."""
    first = len(comfy.events)
    ended = comfy.run(asked)
    turns = [e for e in comfy.events[first:] if e["type"] == "executing"]
    place = next(i for i, e in enumerate(turns) if e["data"]["node"] == "3")
    seconds = turns[place + 1]["heard_s"] - turns[place]["heard_s"]
    told = ended["outputs"]["4"]["text"][0]
    return seconds, float(told.split()[1])


def commanded(folder: Path, seed: int, shape: dict[str, int]) -> float:
    """Seconds that the command's engine reports for the same."""
    command = [
        sys.executable, "-m", "penstock", "generate", "--model", str(MINI), "--json", "--force",
        "--image", str(demo_picture()), "--prompt", str(ASKED["prompt"]), "--seed", str(seed),
        "--cfg", str(ASKED["cfg"]), "--shift", str(ASKED["shift"]), "--steps", str(shape["steps"]),
        "--size", f"{shape['width']}x{shape['height']}", "--frames", str(shape["frames"]),
        "--vram", BUDGETS["vram"], "--ram", BUDGETS["ram"], "--device", BUDGETS["device"],
        "-o", str(folder / "out.mp4"),
    ]  # fmt: skip
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PENSTOCK_DATA_DIR": str(folder / "jobs")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return float(json.loads(done.stdout.splitlines()[-1])["report"]["seconds"])


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comfy = Comfy(Path(folder) / "base")
        try:
            comfy.run(prompt(0, True, HELD | {"frames": 5}))  # the worker, and ComfyUI's libraries
            rounds = []
            for seed in range(1, args.rounds + 1):
                node_s, engine_s = executed(comfy, prompt(seed, False, TIMED))
                rounds.append((node_s, engine_s, commanded(Path(folder), seed, TIMED)))
            video = held(comfy, 101, images=False)
            frames = held(comfy, 102, images=True)
        finally:
            comfy.close()
    row = {
        "benchmark": "comfyui",
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "node_s": [each[0] for each in rounds],
        "node_engine_s": [each[1] for each in rounds],
        "command_s": [each[2] for each in rounds],
        "around_the_engine": statistics.median(node / engine for node, engine, _ in rounds),
        "node_over_command": statistics.median(node / command for node, _, command in rounds),
        "frame_bytes": 4 * 3 * math.prod(HELD[name] for name in ("width", "height", "frames")),
        "grown_with_video_alone": video,
        "grown_with_frames": frames,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
