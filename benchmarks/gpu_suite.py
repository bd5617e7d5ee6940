"""All that a GPU has to show, in one command and under eight minutes.

    python -m benchmarks.gpu_suite [--out benchmarks/results] [--folder DIR] [--groups a,b]
    python -m benchmarks.gpu_suite --missing        # what an earlier run has not come to
    python -m benchmarks.gpu_suite --dry-run        # every case at tiny shapes, on the CPU

Wan2.1 I2V 14B of true shapes with random int8 weights is written to ``--folder`` (17 GB, and 4 GB
of a shorter one) and removed again. Nothing is fetched. The groups, in this order:

- ``correctness``: streamed from disk, from RAM and sequentially, and with delays injected into each
  stream, all bit for bit what the resident model gives;
- ``speeds``: s/forward resident, from RAM and from disk at three sizes (the shorter model: a block
  takes as long in a short model as in a long one);
- ``formats``: each path of a quantised linear, and each attention kernel;
- ``vae``: the decode of the 720p video, in the plan's tiles and whole;
- ``peaks``: all blocks, guided, 720p, under caps of 24 to 4 GiB: the process's share is capped, a
  second process holds the rest of the card, and the allocator's peak is held against the plan;
- ``peers``: `benchmarks.peers` on the card.

Each group is a process of its own with its share of the time; each case is written to the JSON file
as soon as it is done, so that what is cut short keeps what it has. ``--missing`` goes on with such
a file: cases that it holds stay, those that failed or were skipped are tried again; ``runs`` in the
file tells which commit did what. ``--models DIR`` keeps the models for the next call.
`benchmarks.render` turns the files into tables. The last line on stdout is the path of the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import GROUPS, Context, Failure, scale
from penstock.engine.bench.machine import commit

SECONDS = 470.0
SHARES: Mapping[str, float] = {
    "write": 60, "correctness": 70, "speeds": 110, "formats": 40, "vae": 60, "peaks": 300,
    "peers": 90,
}  # fmt: skip
"""The most that a group may take, whatever is left in all."""


def main() -> None:
    """Run one group, or all of them."""
    options = parse()
    if options.group is not None:
        run_group(options.group, context_of(options), Kept(options.file), deadline(options))
        return
    path = options.out / f"gpu_suite_{slug(device_name(options.dry_run))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    options.file = path
    with ExitStack() as stack:
        if options.models is None:
            made = tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-gpu-")
            options.models = Path(stack.enter_context(made))
        run_all(options, Kept(path))
    print(path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The GPU suite")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--folder", default=None, help="where the models are written")
    parser.add_argument("--models", type=Path, default=None, help="where they are, or are kept")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--missing", action="store_true", help="go on with the file in --out")
    parser.add_argument("--commit", default=None, help="where git cannot tell it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--group", choices=list(GROUPS), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def context_of(options: argparse.Namespace) -> Context:
    """What the cases work with."""
    return Context(scale(dry=options.dry_run), options.models)


def deadline(options: argparse.Namespace) -> float:
    """On the clock of `time.monotonic`."""
    return time.monotonic() + float(options.seconds)


class Kept:
    """The JSON file: whole at every moment, whatever ends the process.

    Args:
        path: written anew beside itself and renamed, case by case.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.report: dict[str, Any] = {"benchmark": "gpu_suite", "groups": {}}
        if path.exists():
            self.report = json.loads(path.read_text(encoding="utf-8"))

    def put(self, group: str, case: str, found: Mapping[str, Any]) -> None:
        """Keep what one case has found."""
        self.report["groups"].setdefault(group, {})[case] = dict(found)
        self.write()

    def has(self, group: str, case: str) -> bool:
        """Whether a case has come to its end before."""
        found = self.report["groups"].get(group, {}).get(case)
        return found is not None and is_done(found)

    def note(self, **facts: Any) -> None:
        """Keep facts about the whole run."""
        self.report |= facts
        self.write()

    def write(self) -> None:
        """Replace the file at once."""
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)


def run_group(group: str, context: Context, kept: Kept, until: float) -> None:
    """All cases of a group, each kept when it is done; those after the deadline are named, those
    that are kept already are left."""
    for case, work in GROUPS[group](context):
        if group != "write" and kept.has(group, case):
            continue
        if time.monotonic() > until:
            kept.put(group, case, {"skipped": "no time was left"})
            continue
        started = time.monotonic()
        try:
            found = dict(work())
        except Failure as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        kept.put(group, case, found | {"case_s": round(time.monotonic() - started, 2)})
        print(f"{group}/{case}: {json.dumps(kept.report['groups'][group][case])}", flush=True)


def run_all(options: argparse.Namespace, kept: Kept) -> None:
    """Every group within its share of the time; a dry run does them in this process."""
    started = time.monotonic()
    if not options.missing:
        kept.report = {"benchmark": "gpu_suite", "groups": {}}
    run = {"commit": options.commit or commit(), "groups": options.groups}
    runs = [*kept.report.get("runs", ()), run]
    kept.note(dry_run=options.dry_run, complete=False, runs=runs)
    for group in ["write", *[name for name in options.groups.split(",") if name != "write"]]:
        left = options.seconds - (time.monotonic() - started)
        share = min(SHARES[group], left)
        if options.dry_run:
            run_group(group, context_of(options), kept, time.monotonic() + left)
        else:
            run_child(group, options, share)
            kept.report = json.loads(options.file.read_text(encoding="utf-8"))
    run["seconds"] = round(time.monotonic() - started, 1)
    kept.note(complete=not cut_short(kept.report), runs=runs)


def run_child(group: str, options: argparse.Namespace, share: float) -> None:
    """One group in a process of its own, ended when its time is over."""
    kept = Kept(options.file)
    if share < 5:
        kept.put(group, "all", {"skipped": "no time was left"})
        return
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--group", group]
    command += ["--file", str(options.file), "--models", str(options.models)]
    command += ["--seconds", str(0.8 * share)]
    try:
        done = subprocess.run(command, timeout=share, check=False)
    except subprocess.TimeoutExpired:
        Kept(options.file).put(group, "all", {"failed": f"longer than {share:.0f} s"})
        return
    if done.returncode != 0:
        Kept(options.file).put(group, "all", {"failed": f"exit code {done.returncode}"})


def cut_short(report: Mapping[str, Any]) -> bool:
    """Whether any case was left out or did not come to its end."""
    return not all(is_done(found) for found in cases(report))


def is_done(found: Mapping[str, Any]) -> bool:
    """Whether a case came to its end."""
    return "skipped" not in found and "failed" not in found


def cases(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every case of every group."""
    for group in report["groups"].values():
        yield from group.values()


def device_name(dry: bool) -> str:
    """Of the card; without one only a dry run makes sense."""
    if dry:
        return "dry run"
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: --dry-run goes through every case at tiny shapes on the CPU")
    return str(torch.cuda.get_device_name())


def slug(name: str) -> str:
    """A name for a file."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    main()
