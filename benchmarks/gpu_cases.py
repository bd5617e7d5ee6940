"""The cases of the GPU suite: what each runs, and what it tells. See `benchmarks.gpu_suite`.

Here: writing, correctness, speeds and peers; `benchmarks.gpu_memory` and `benchmarks.gpu_kernels`
have the others.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_context import Case, Context, allocator, speed, written
from benchmarks.gpu_kernels import formats
from benchmarks.gpu_memory import peaks, vae
from benchmarks.peers import await_ready, measured, parse, start, summary, weights_file
from penstock.engine.bench.machine import machine
from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.result import BenchResult
from penstock.errors import PenstockError
from penstock.offload import streamer
from penstock.offload.schedule import Queue, Ref
from penstock.offload.tiers import Link, open_link
from penstock.profiles.plan import Plan, StreamPlan

Failure = (PenstockError, RuntimeError, OSError, ValueError, NotImplementedError, ImportError)
"""What a case may end with (an ImportError: nf4 needs bitsandbytes, int8 attention comfy-kitchen);
anything else is a mistake in the case itself and ends its group."""

SHORT_STEP_S = 1.0
"""Of steps below, two are counted wherever the blocks live; of longer ones two where they are
resident, which shows how little they differ, and one elsewhere."""


# Writing


def write(context: Context) -> Iterator[Case]:
    """What machine this is (each run's commit is told elsewhere), and the model that most groups
    work with."""
    yield "machine", lambda: {k: v for k, v in machine(context.device).items() if k != "commit"}
    yield "short", lambda: written(context, "short", context.scale.short_blocks)


# Correctness


@dataclass(frozen=True)
class Delays:
    """A link that lets one of its queues lag behind.

    Args:
        link: the real one.
        queue: whose operations are late.
        delay: makes what is issued next on the device's current stream wait; for reads, the thread.
    """

    link: Link
    queue: Queue
    delay: Callable[[Queue, Link], None]

    def wait(self, queue: Queue, ref: Ref) -> None:
        """As the link, and then late."""
        self.link.wait(queue, ref)
        if queue is self.queue:
            self.delay(queue, self.link)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """As the link; a late copy begins late also where it has nothing to wait for."""
        if self.queue is Queue.COPY:
            self.delay(Queue.COPY, self.link)
        self.link.copy(target, source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)


def late(passes: int, device: torch.device) -> Callable[[Queue, Link], None]:
    """A delay on the device where it has streams, on the host where it has not."""

    def delay(queue: Queue, link: Link) -> None:
        if device.type != "cuda" or queue is Queue.READ:
            time.sleep(passes / 1e9)
            return
        stream = link._stream(queue)  # type: ignore[attr-defined]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(passes)  # type: ignore[no-untyped-call]

    return delay


@contextmanager
def delayed(queue: Queue | None, context: Context) -> Iterator[None]:
    """Every stream opened meanwhile lags in ``queue``."""
    if queue is None:
        yield
        return
    delay = late(context.scale.delay_cycles, context.device)

    def opened(device: torch.device, longest_wait: int) -> Any:
        return Delays(open_link(device, longest_wait), queue, delay)

    with mock.patch.object(streamer, "open_link", opened):
        yield


def correctness(context: Context) -> Iterator[Case]:
    """The same latents wherever the blocks live and whatever is late."""
    count = context.scale.short_blocks
    disk = StreamPlan(count, 0, 0, 2, 2)
    tight = StreamPlan(count, 0, 0, 1, 1)
    mixed = StreamPlan(count, count // 4, count // 4, 2, 1)
    resident = StreamPlan(count, count)

    @cache
    def expected() -> str:
        return placed(context, context.scale.small, resident, 2).latents_sha256

    for name, places, overlapped, queue in (
        ("resident", resident, True, None),
        ("from RAM", StreamPlan(count, 0, count, 2, 0), True, None),
        ("from disk", disk, True, None),
        ("mixed", mixed, True, None),
        ("sequential", tight, False, None),
        ("late copies", disk, True, Queue.COPY),
        ("late computation", disk, True, Queue.COMPUTE),
        ("late reads", disk, True, Queue.READ),
        ("late copies, rings of one", tight, True, Queue.COPY),
        ("late computation, rings of one", tight, True, Queue.COMPUTE),
    ):

        def work(
            places: StreamPlan = places, overlapped: bool = overlapped, queue: Queue | None = queue
        ) -> dict[str, Any]:
            wanted = expected()
            with delayed(queue, context):
                found = placed(context, context.scale.small, places, 2, overlapped=overlapped)
            return {"identical": found.latents_sha256 == wanted, "s": found.median_s}

        yield name, work


def placed(
    context: Context,
    size: tuple[int, int, int],
    places: StreamPlan,
    steps: int,
    *,
    warmup: int = 0,
    overlapped: bool = True,
) -> BenchResult:
    """Steps of the short model with its blocks where ``places`` says."""
    context.release()
    with context.engine("short", branches="1", cross_kv="vram") as engine:
        request = context.request(size, steps + warmup)
        plan = with_places(engine.plan(request), places)
        asked = Asked(request, warmup, context.scale.name, overlapped=overlapped)
        return measure(engine, asked, plan=plan, reached=context.links)


def with_places(plan: Plan, places: StreamPlan) -> Plan:
    """``plan`` with the transformer's blocks elsewhere."""
    return plan.with_phases((replace(plan["denoise"], stream=places),))


# Speeds


def speeds(context: Context) -> Iterator[Case]:
    """s/forward and the share of resident, at each size."""
    count = context.scale.short_blocks
    resident = StreamPlan(count, count)

    @cache
    def beside(size: tuple[int, int, int]) -> BenchResult:
        return placed(context, size, resident, 2, warmup=1)

    for size in context.scale.sizes:
        for where, places in (
            ("resident", resident),
            ("RAM", StreamPlan(count, 0, count, 2, 0)),
            ("disk", StreamPlan(count, 0, 0, 2, 2)),
        ):

            def work(
                size: tuple[int, int, int] = size, places: StreamPlan = places
            ) -> dict[str, Any]:
                found, over = beside(size), beside(size).median_s
                if places != resident:
                    counted = 2 if over < SHORT_STEP_S else 1
                    found = placed(context, size, places, counted, warmup=1)
                return speed(found, count) | {
                    "over_resident": found.median_s / over,
                    "planned_bytes": max(phase.predicted_vram_bytes for phase in found.phases),
                    "ledger_bytes": found.peak_vram_bytes,
                    **allocator(context.device),
                }

            yield f"{size[1]}x{size[0]}x{size[2]}, {where}", work


# Peers


def peers(context: Context) -> Iterator[Case]:
    """`benchmarks.peers`, each in a process of its own. All import at once, while their model is
    written and nothing is measured."""
    options = peer_options(context)
    with ExitStack() as stack:
        waiting = {
            name: stack.enter_context(ended(start(options, name, context.folder)))
            for name in (CUDA_PEERS if context.device.type == "cuda" else CPU_PEERS)
        }

        @cache
        def ready() -> dict[str, Any]:
            found = written(context, "model", context.scale.peer_blocks, "bf16")
            for process in waiting.values():
                await_ready(process)
            return found

        yield "writing", ready
        for name, process in waiting.items():

            def work(name: str = name, process: subprocess.Popen[str] = process) -> dict[str, Any]:
                ready()
                found = {name: measured(process, name, options, context.folder)}
                told = summary(options, found, weights_file(context.folder).stat().st_size)
                return {"size": told["size"], "model": told["model"], **found[name]}

            yield name, work


CPU_PEERS = ("penstock_ram", "resident")
CUDA_PEERS = (
    "penstock_ram", "group_offload", "penstock_disk", "group_offload_disk", "resident",
    "accelerate_cpu", "mmgp", "model_offload",
)  # fmt: skip


def peer_options(context: Context) -> argparse.Namespace:
    """A forward at the smallest size, over a short model in bf16."""
    scale = context.scale
    flags = {
        "device": scale.device, "size": "x".join(map(str, scale.sizes[-1])), "name": scale.name,
        "blocks": scale.peer_blocks, "rounds": 1, "limit-s": 60,
    }  # fmt: skip
    return parse([f"--{flag}={value}" for flag, value in flags.items()])


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is over at the end, whether it had its turn or not."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


GROUPS: Mapping[str, Callable[[Context], Iterator[Case]]] = {
    "write": write,
    "correctness": correctness,
    "vae": vae,
    "peaks": peaks,
    "speeds": speeds,
    "formats": formats,
    "peers": peers,
}
