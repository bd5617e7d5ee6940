"""All that a GPU has to show, in one command and under eight minutes.

    python -m benchmarks.gpu_suite [--out benchmarks/results] [--folder DIR] [--groups a,b]
    python -m benchmarks.gpu_suite --missing        # what an earlier run has not come to
    python -m benchmarks.gpu_suite --minutes 12     # what is worth most of that, in so many minutes
    python -m benchmarks.gpu_suite --dry-run        # every case at tiny shapes, on the CPU

Wan2.1 I2V 14B of true shapes with random int8 weights is written to ``--folder`` (17 GB, 4 GB of a
shorter one, and 5 GB of one in bf16) and removed again. Nothing is fetched. The groups, what is
worth most first:

- ``correctness``: streamed from disk, from RAM and sequentially, and with delays injected into each
  stream, all bit for bit what the resident model gives;
- ``vae``: the decode of the 720p video, in the plan's tiles and whole;
- ``peaks``: all blocks, guided, 720p, under caps of 24 to 4 GiB: the process's share is capped, a
  second process holds the rest of the card, and the allocator's peak is held against the plan;
- ``speeds``: s/forward resident, from RAM and from disk at three sizes (the shorter model: a block
  takes as long in a short model as in a long one);
- ``formats``: each path of a quantised linear, and each attention kernel;
- ``peers``: `benchmarks.peers` on the card.

Groups run one after another in one process, from ``peaks`` on in another; where a group takes its
process down, outlives its share of the time or leaves the device unusable, a new process goes on
with the next group. Each case is written to the JSON file as soon as it is done, so that what is
cut short keeps what it has. ``--missing`` goes on with such a file: cases that it holds stay, those
that failed or were skipped are tried again; ``runs`` in the file tells which commit did what.
``--models DIR`` keeps the models for the next call. `benchmarks.render` turns the files into
tables. The last line on stdout is the path of the file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import GROUPS, Failure
from benchmarks.gpu_context import Case, Context, scale
from benchmarks.gpu_worth import PARTS, WRITE_S, Part, chosen
from benchmarks.render import is_done
from penstock.engine.bench.machine import commit

Groups = Mapping[str, Callable[[Context], Iterator[Case]]]

SECONDS = 470.0
SHARES: Mapping[str, float] = {
    "write": 60, "correctness": 70, "vae": 80, "peaks": 275, "speeds": 80, "formats": 40,
    "peers": 160,
}  # fmt: skip
"""The most that a group may take, whatever is left in all."""

ALONE = "peaks"
"""The group that begins in a new process, the only one on the card: what its context and its
kernels take is part of what it tells."""

IMPORTED = "diffusers.pipelines.wan.pipeline_wan_i2v"
"""What takes seconds to import, with all that it imports in turn: before a process is asked."""

NO_TIME = {"skipped": "no time was left"}


def main() -> None:
    """Run all groups that are asked for."""
    options = parse()
    path = options.out / f"gpu_suite_{slug(device_name(options.dry_run))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    options.file = path
    with ExitStack() as stack:
        if options.models is None:
            made = tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-gpu-")
            options.models = Path(stack.enter_context(made))
        workers = stack.enter_context(Workers(options))
        if options.minutes is None:
            run_all(options, Kept(path), workers.run)
        else:
            run_parts(options, Kept(path), workers.run)
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
    parser.add_argument("--minutes", type=float, default=None, help="what is worth most of all")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    return parser.parse_args()


def context_of(options: argparse.Namespace) -> Context:
    """What the cases work with."""
    return Context(scale(dry=options.dry_run), options.models)


class Kept:
    """The JSON file: whole at every moment, whatever ends the process.

    Args:
        path: written anew beside itself and renamed, case by case.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.report: dict[str, Any] = {"benchmark": "gpu_suite", "groups": {}}
        self.read()

    def read(self) -> None:
        """Take over what another process has written."""
        if self._path.exists():
            self.report = json.loads(self._path.read_text(encoding="utf-8"))

    def put(self, group: str, case: str, found: Mapping[str, Any]) -> None:
        """Keep what one case has found."""
        self.report["groups"].setdefault(group, {})[case] = dict(found)
        self.write()

    def drop(self, group: str, case: str) -> None:
        """Forget a case, if there is one."""
        if self.report["groups"].get(group, {}).pop(case, None) is not None:
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


def run_group(
    group: str, cases: Iterable[Case], kept: Kept, until: float, only: Sequence[str] = ()
) -> None:
    """All cases of a group, or those named in ``only``, each kept when it is done; those after the
    deadline are named, those that are kept already are left."""
    for case, work in cases:
        if group != "write" and (kept.has(group, case) or (only and case not in only)):
            continue
        if time.monotonic() > until:
            kept.put(group, case, NO_TIME)
            continue
        started = time.monotonic()
        try:
            found = dict(work())
        except Failure as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        kept.put(group, case, found | {"case_s": round(time.monotonic() - started, 2)})
        print(f"{group}/{case}: {json.dumps(kept.report['groups'][group][case])}", flush=True)


def run_all(
    options: argparse.Namespace, kept: Kept, run: Callable[[str, float], str | None]
) -> None:
    """Every group within its share of the time; ``run`` is given a group and its share."""
    started = time.monotonic()
    if not options.missing:
        kept.report = {"benchmark": "gpu_suite", "groups": {}}
    done = {"commit": options.commit or commit(), "groups": options.groups}
    runs = [*kept.report.get("runs", ()), done]
    kept.note(dry_run=options.dry_run, complete=False, runs=runs)
    for group in ["write", *[name for name in options.groups.split(",") if name != "write"]]:
        share = min(SHARES[group], options.seconds - (time.monotonic() - started))
        kept.drop(group, "all")  # of an earlier run
        told = run(group, share) if share >= 5 else None
        kept.read()
        if told is not None:
            kept.put(group, "all", {"failed": told})
        elif share < 5:
            kept.put(group, "all", NO_TIME)
    done["seconds"] = round(time.monotonic() - started, 1)
    kept.note(complete=not cut_short(kept.report), runs=runs)


def run_parts(
    options: argparse.Namespace,
    kept: Kept,
    run: Callable[[str, float, Sequence[str]], str | None],
    parts: Sequence[Part] = PARTS,
) -> None:
    """What is worth most and not yet measured, in ``options.minutes``; an earlier run's cases stay.

    Args:
        options: of the command line.
        kept: the file.
        run: is given a group, its share of the time and the names of the cases.
        parts: what there is to do, in the order of its worth.
    """
    started, total = time.monotonic(), 60 * options.minutes
    wanted = chosen(kept.has, total, parts)
    done = {"commit": options.commit or commit(), "minutes": options.minutes}
    runs = [*kept.report.get("runs", ()), done]
    kept.note(dry_run=options.dry_run, complete=False, runs=runs)
    for part in [Part("write", (), WRITE_S), *wanted]:
        left = total - (time.monotonic() - started)
        kept.drop(part.group, "all")  # of an earlier run
        told = (
            run(part.group, min(_PATIENCE * part.seconds, left), part.cases) if left > 5 else None
        )
        kept.read()
        if told is not None:
            kept.put(part.group, "all", {"failed": told})
    done["seconds"] = round(time.monotonic() - started, 1)
    kept.note(complete=not cut_short(kept.report), runs=runs)


_PATIENCE = 1.5
"""Of its estimate, what a part may take."""


class Workers:
    """Runs groups one after another in one process as long as it lives, and then in the next. A
    context manager.

    Two start at once, so that the second has its imports behind it when it is needed.

    Args:
        options: of the command line.
        groups: what there is to run.
    """

    def __init__(self, options: argparse.Namespace, groups: Groups = GROUPS) -> None:
        self._options, self._groups = options, groups
        self._now = Worker(options, groups)
        self._spare: Worker | None = Worker(options, groups)

    def run(self, group: str, share: float, only: Sequence[str] = ()) -> str | None:
        """As `Worker.run`; `ALONE` ends the process before it, whose context is on the card."""
        if group == ALONE:
            self._now.end()
        if not self._now.is_alive():
            self._now = self._spare or Worker(self._options, self._groups)
            self._spare = None
        return self._now.run(group, share, only)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._now.end()
        if self._spare is not None:
            self._spare.end()


class Worker:
    """A process that runs the groups it is given.

    Args:
        options: of the command line.
        groups: what there is to run.
    """

    def __init__(self, options: argparse.Namespace, groups: Groups) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, options, groups), daemon=True)
        self._process.start()
        theirs.close()

    def is_alive(self) -> bool:
        """Whether it can take a group."""
        return self._process.is_alive()

    def run(self, group: str, share: float, only: Sequence[str] = ()) -> str | None:
        """A group, or its cases named in ``only``, within ``share`` seconds; what went wrong, if it
        has not come to its end. The process is over then."""
        try:
            self._pipe.send((group, share, only))
            if not self._pipe.poll(share):
                self.end()
                return f"longer than {share:.0f} s"
            self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return f"exit code {self._process.exitcode}"
        return None

    def end(self) -> None:
        """Whatever it is doing."""
        self._process.kill()
        self._process.join()


def serve(pipe: Connection, options: argparse.Namespace, groups: Groups) -> None:
    """In a worker's process: the groups that come down the pipe, each answered when it is over. A
    device that a group leaves unusable ends the process."""
    importlib.import_module(IMPORTED)
    context = context_of(options)
    while True:
        group, share, only = pipe.recv()
        until = time.monotonic() + 0.8 * share
        run_group(group, groups[group](context), Kept(options.file), until, only)
        context.settle()
        pipe.send(group)


def cut_short(report: Mapping[str, Any]) -> bool:
    """Whether any case was left out or did not come to its end."""
    return not all(is_done(found) for found in cases(report))


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
