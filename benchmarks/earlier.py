"""This build beside an earlier one: jobs with and without a step cache, and the older benchmarks.

    python -m benchmarks.earlier --old ../earlier [--pairs 3] [--only PART]... [--save FILE.json]

Both checkouts do the same work in turns, each in a process of its own on one thread:

- ``job``: a video of 40 steps by the small model in the box. Seconds of denoising: the earlier
  build, this one, and this one with half of the forwards; whether the first two are equal to the
  bit (hidden states in bf16, as the earlier build keeps them);
- ``lean_forward``, ``disk_tier``, ``overlap``: each checkout's own benchmark of that name.

Beside each figure of this build over the earlier one's, by the median of the pairs, stands how far
the earlier build's own runs lie apart: less than that is noise. ``benchmarks.vae_reuse`` is the
same for the VAE. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from penstock.engine.store.durable import FileOps, write_atomically

HERE = Path(__file__).resolve().parent.parent
STEPS = 40
Figures = dict[str, float]


def run(checkout: Path, *arguments: str) -> Any:
    """The last line on stdout of ``python -m`` in a checkout, read as JSON."""
    told = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=checkout, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(told.stdout.strip().splitlines()[-1])


def in_turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Each of the names in every round, the first of them changing."""
    order = list(names)
    for number in range(rounds):
        yield from order[:: 1 if number % 2 == 0 else -1]


def denoised(checkout: Path, folder: Path, *options: str) -> tuple[float, str]:
    """Seconds of the denoising of a small video, and a digest of the file."""
    video = folder / "video.mp4"
    report = run(
        checkout, "penstock", "generate", "--device", "cpu", "--json", "--force", "--no-metadata",
        "--model", str(HERE / "penstock" / "assets" / "mini"), "--prompt", "a red ball moves right",
        "--image", str(folder / "picture.png"), "--seed", "1", "--steps", str(STEPS), "--cfg", "4",
        "--size", "64x64", "--frames", "17", "--job", tempfile.mkdtemp(dir=folder),
        "-o", str(video), *options,
    )["report"]  # fmt: skip
    seconds = {phase["name"]: phase["seconds"] for phase in report["phases"]}
    return seconds["denoise"], hashlib.sha256(video.read_bytes()).hexdigest()


def job(old: Path, pairs: int) -> dict[str, Any]:
    """Denoising by the earlier build, by this one, and with half of the forwards."""
    as_before = ("--residual", "bf16")
    half = (*as_before, "--cache", f"plan:{STEPS // 2}")
    ways = {"old": (old, ()), "new": (HERE, as_before), "half": (HERE, half)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests: dict[str, set[str]] = {name: set() for name in ways}
    with tempfile.TemporaryDirectory(prefix="penstock-earlier-") as name:
        folder = Path(name)
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "picture.png")
        for way in in_turns(ways, pairs):
            checkout, options = ways[way]
            took, digest = denoised(checkout, folder, *options)
            seconds[way].append(took)
            digests[way].add(digest)
    return {
        "identical": digests["old"] == digests["new"] and len(digests["new"]) == 1,
        "rows": [
            beside(f"denoising seconds, {told}", seconds["old"], seconds[way])
            for way, told in (("new", "no cache"), ("half", "half of the forwards"))
        ],
    }


def paired(
    old: Path, pairs: int, command: tuple[str, ...], figures: Callable[[Any], Figures]
) -> dict[str, Any]:
    """A benchmark that both checkouts have."""
    checkouts = {"old": old, "new": HERE}
    found: dict[str, list[Figures]] = {name: [] for name in checkouts}
    for name in in_turns(checkouts, pairs):
        found[name].append(figures(run(checkouts[name], *command)))
    return {
        "rows": [
            beside(name, *([each[name] for each in found[who]] for who in found))
            for name in found["old"][0]
        ]
    }


def beside(figure: str, old: list[float], new: list[float]) -> dict[str, Any]:
    """One figure of both builds."""
    return {
        "figure": figure,
        "old": old,
        "new": new,
        "new_over_old": statistics.median(b / a for a, b in zip(old, new, strict=True)),
        "old_spread": max(old) / min(old),
    }


def _lean(report: Mapping[str, Any]) -> Figures:
    return {
        "CPU time of a step over diffusers'": report["step_ratio"],
        "the same with cross-attention K/V": report["first_ratio"],
        "activation bytes over diffusers'": report["activation_share"],
    }


def _disk(report: Mapping[str, Any]) -> Figures:
    told = {"stream_gb_per_s": "GB/s of the stream", "ratio": "the same over plain direct reads"}
    return {
        f"{name}, {kind}": report[kind][figure]
        for kind in ("raw", "pack")
        for figure, name in told.items()
    }


def _overlap(report: Mapping[str, Any]) -> Figures:
    return {
        "machines of 1000 that reach 98 % of the bound": report["reach_98"],
        "share of the bound on the worst machine": report["worst"],
    }


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "job": job,
    "lean_forward": lambda old, pairs: paired(old, pairs, ("benchmarks.lean_forward",), _lean),
    "disk_tier": lambda old, pairs: paired(old, pairs, ("benchmarks.disk_tier",), _disk),
    # The simulated machine gives the same at every run.
    "overlap": lambda old, pairs: paired(old, 1, ("benchmarks.overlap",), _overlap),
}


def main() -> None:
    """Measure part by part; print the figures, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, required=True, help="checkout of the earlier build")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; all by default")
    parser.add_argument("--save", type=Path, help="keep the parts in this file, and add to it")
    asked = parser.parse_args()
    saved = asked.save is not None and asked.save.exists()
    report = json.loads(asked.save.read_text(encoding="utf-8")) if saved else {}
    for name in asked.only or PARTS:
        report[name] = PARTS[name](asked.old.resolve(), asked.pairs)
        for row in report[name]["rows"]:
            print(f"{name}: {row['figure']}: {row['new_over_old']:.3f} of the earlier build's")
    report["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    if asked.save is not None:
        write_atomically(FileOps(), asked.save, [(json.dumps(report, indent=1) + "\n").encode()])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
