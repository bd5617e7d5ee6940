"""The cases of the GPU suite: what each runs, and what it tells. See `benchmarks.gpu_suite`."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.peers import await_ready, measured, parse, start, summary, weights_file
from penstock.engine.bench.machine import links, machine
from penstock.engine.bench.measure import Asked, MeasuredStage, measure
from penstock.engine.bench.result import BenchResult, Links
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.engine import Engine
from penstock.engine.pipeline import decode, encode_condition
from penstock.engine.request import GenerationRequest
from penstock.engine.sampling import Sampling
from penstock.engine.wan.attention import attention, int8_attention
from penstock.errors import PenstockError
from penstock.offload import streamer
from penstock.offload.allocator import allocator_capped
from penstock.offload.schedule import Queue, Ref
from penstock.offload.tiers import Link, open_link
from penstock.profiles.plan import Plan, StreamPlan
from penstock.profiles.profile import Overrides
from penstock.quant.compute import Operands, strategy_for
from penstock.quant.format import get_format
from penstock.quant.paths import Computing, Scratch
from penstock.quant.probe import probe, working
from penstock.units import GIB, MIB

Failure = (PenstockError, RuntimeError, OSError, ValueError, NotImplementedError, ImportError)
"""What a case may end with (an ImportError: nf4 needs bitsandbytes, int8 attention comfy-kitchen);
anything else is a mistake in the case itself and ends its group."""

LARGE_CONTEXT_BYTES = 800 * MIB
"""Of a card, for the context and the kernels of an H200: more than a consumer card's take."""

HEADROOMS = (0, 256 * MIB, 768 * MIB)
"""Tried one after the other where the plan's own peak does not fit the card."""

SAMPLE_BYTES = 256 * MIB
"""Read of a model's file, to know what the disk reaches."""

SHORT_STEP_S = 1.0
"""Of steps below, two are counted wherever the blocks live; of longer ones two where they are
resident, which shows how little they differ, and one elsewhere."""

Case = tuple[str, Callable[[], Mapping[str, Any]]]


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        name, blocks, short_blocks: of the synthetic model, and of its shorter version.
        caps: name and bytes of the cards to imitate.
        reserve_bytes: of a card, for its context and the display.
        large: width, height and frames of the large video; ``sizes`` of the speeds; ``small`` of
            the correctness cases.
        tokens, context: of the products and of attention.
        delay_cycles: of the injected delays, in clock cycles of the device.
        tiles: rows and columns of the VAE's tiled case.
        peer_blocks: of the model, in bf16, that the peers work with.
    """

    device: str
    name: str
    blocks: int
    short_blocks: int
    caps: Mapping[str, int]
    reserve_bytes: int
    large: tuple[int, int, int]
    sizes: tuple[tuple[int, int, int], ...]
    small: tuple[int, int, int]
    matrix: tuple[int, int]
    tokens: int
    context: int
    heads: int
    delay_cycles: int
    repeats: int
    tiles: str
    peer_blocks: int


def scale(*, dry: bool) -> Scale:
    """True shapes, or tiny ones for a run through every case on the CPU."""
    if dry:
        return Scale(
            "cpu", "tiny", 4, 2, {"large": 64 * MIB, "small": 8 * MIB}, 0, (32, 32, 5),
            ((48, 32, 5),), (32, 32, 5), (256, 128), 32, 64, 2, 1000, 2, "1x2", 2,
        )  # fmt: skip
    caps = {f"{size} GiB": size * GIB for size in (12, 8, 24, 4, 16, 6)}
    return Scale(
        "cuda", "wan2.1-i2v-14b", 40, 8, caps, LARGE_CONTEXT_BYTES, (1280, 720, 81),
        ((1280, 720, 81), (960, 528, 77), (832, 480, 81)), (256, 256, 5), (13824, 5120), 8192,
        75_600, 40, 20_000_000, 10, "3x3", 6,
    )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What the cases work with: the scale, and the folder that holds the models."""

    scale: Scale
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return torch.device(self.scale.device)

    def engine(self, model: str, *, vram: int | None = None, **overrides: str) -> Engine:
        """A model opened, under a budget or under what is free."""
        return Engine.open(
            self.folder / model,
            vram=vram,
            device=self.scale.device,
            overrides=Overrides(**overrides),
        )

    def request(
        self, size: tuple[int, int, int], steps: int, *, guided: bool = False
    ) -> GenerationRequest:
        """A job of that size; its picture is never opened."""
        width, height, frames = size
        return GenerationRequest(
            prompt="a benchmark", image=Path("not opened"), width=width, height=height,
            frames=frames, steps=steps, guidance_scale=5.0 if guided else 1.0, seed=0,
        )  # fmt: skip

    @cached_property
    def links(self) -> Links:
        """What disk and link reach, measured once a process on the short model's file."""
        (file,) = (self.folder / "short" / "transformer").glob("*.safetensors")
        found = links(self.device, file, SAMPLE_BYTES)
        self.release()
        return found

    def release(self) -> None:
        """Give cached memory back between cases."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def settle(self) -> None:
        """Leave nothing to the next group.

        Raises:
            RuntimeError: an earlier error has made the device unusable for this process.
        """
        gc.collect()
        self.release()
        finish(self)


# Writing


def write(context: Context) -> Iterator[Case]:
    """What machine this is (each run's commit is told elsewhere), and the model that most groups
    work with."""
    yield "machine", lambda: {k: v for k, v in machine(context.device).items() if k != "commit"}
    yield "short", lambda: written(context, "short", context.scale.short_blocks)


def written(
    context: Context, model: str, blocks: int, weight_format: str = "int8"
) -> dict[str, Any]:
    """A model of so many blocks, and how long writing it took; one that is there is taken."""
    started, folder = time.perf_counter(), context.folder / model
    if not folder.exists():
        beside = folder.with_name(f"{model}.new")
        write_synthetic(beside, context.scale.name, blocks=blocks, weight_format=weight_format)
        beside.rename(folder)
    nbytes = sum(path.stat().st_size for path in (folder / "transformer").iterdir())
    return {"blocks": blocks, "bytes": nbytes, "s": time.perf_counter() - started}


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


def late(cycles: int, device: torch.device) -> Callable[[Queue, Link], None]:
    """A delay on the device where it has streams, on the host where it has not."""

    def delay(queue: Queue, link: Link) -> None:
        if device.type != "cuda" or queue is Queue.READ:
            time.sleep(cycles / 1e9)
            return
        stream = link._stream(queue)  # type: ignore[attr-defined]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

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


def speed(found: BenchResult, blocks: int) -> dict[str, Any]:
    """A result in short."""
    denoise = next(phase for phase in found.phases if phase.name == "denoise")
    return {
        "s_per_forward": found.median_s,
        "s_per_block": found.median_s / blocks,
        "raw_s": list(found.seconds),
        "overlap": found.overlap,
        "read_gb_per_s": denoise.read_bytes_per_s / 1e9,
        "read_ceiling_gb_per_s": found.links.read_bytes_per_s / 1e9,
        "copy_gb_per_s": denoise.copied_bytes_per_s / 1e9,
        "copy_ceiling_gb_per_s": found.links.copy_bytes_per_s / 1e9,
        "waits_s": denoise.waits_s,
    }


# Peaks


class Ballast:
    """A second process that holds memory of the card, so that it is really taken.

    Use as a context manager, on a card that nobody else uses; on a CPU there is nothing to hold.
    The process imports torch from the beginning on, and touches the card when it first holds.

    Attributes:
        others_bytes: what of the card the second process takes.
    """

    _CODE = (
        "import sys, torch\n"
        "for line in sys.stdin:\n"
        "    held = None\n"
        "    torch.cuda.empty_cache()\n"
        "    held = torch.empty(int(line), dtype=torch.uint8, device='cuda')\n"
        "    torch.cuda.synchronize()\n"
        "    print('held', flush=True)\n"
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self.others_bytes = 0

    def imitate(self, card_bytes: int) -> int:
        """Hold so much that this process has a card of ``card_bytes``, its context included;
        returns what is held."""
        if self._device.type != "cuda":
            return 0
        own_bytes = taken(self._device) - self.others_bytes
        self._hold(1)
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        held = max(1, free_bytes - (card_bytes - own_bytes))
        self._hold(held)
        self.others_bytes = taken(self._device) - own_bytes
        return held

    def _hold(self, nbytes: int) -> None:
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{nbytes}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "held":
            raise RuntimeError("the ballast process cannot hold the rest of the card")

    def __enter__(self) -> Ballast:
        if self._device.type == "cuda":
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # In one piece: segments that grow by pages would take seconds.
                env={k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")},
            )
            torch.zeros(1, device=self._device)
            torch.cuda.empty_cache()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def peaks(context: Context) -> Iterator[Case]:
    """One guided step of the large video with all blocks, under each cap."""
    with Ballast(context.device) as ballast:
        yield "writing", lambda: written(context, "long", context.scale.blocks)
        for name, cap_bytes in context.scale.caps.items():

            def work(cap_bytes: int = cap_bytes) -> dict[str, Any]:
                return peak(context, ballast, cap_bytes)

            yield name, work


def peak(context: Context, ballast: Ballast, card_bytes: int) -> dict[str, Any]:
    """What the plan promised, what the ledger counted, what the allocator and the driver held."""
    written(context, "long", context.scale.blocks)  # where an earlier run's was removed
    reached = context.links  # measured before the card is small
    context.release()
    held = ballast.imitate(card_bytes)
    budget_bytes = card_bytes - context.scale.reserve_bytes
    found, headroom = with_headroom(context, budget_bytes, reached)
    worst = max(found.phases, key=lambda phase: phase.allocator_bytes)
    allocated = worst.allocator_bytes or found.peak_vram_bytes
    planned = max(phase.predicted_vram_bytes for phase in found.phases)
    driver = taken(context.device) - ballast.others_bytes
    return speed(found, context.scale.blocks) | {
        "card_bytes": card_bytes,
        "budget_bytes": budget_bytes,
        "headroom_bytes": headroom,
        "ballast_bytes": held,
        "planned_bytes": planned,
        "ledger_bytes": found.peak_vram_bytes,
        "allocated_bytes": allocated,
        "driver_bytes": driver,
        "within_budget": allocated <= budget_bytes,
        "within_card": allocated + driver <= card_bytes,
        "plan_over_allocated": planned / allocated,
        "planned_ram_bytes": max(phase.predicted_ram_bytes for phase in found.phases),
        "process_bytes": max(phase.process_bytes for phase in found.phases),
        "placement": found.placement,
        "chunk_tokens": found.recipe.chunk_tokens,
        "guided": True,
        **allocator(context.device),
    }


def with_headroom(context: Context, budget_bytes: int, reached: Links) -> tuple[BenchResult, int]:
    """One guided step under the budget; where memory runs out all the same, what of it must be left
    alone for that."""
    request = context.request(context.scale.large, 1, guided=True)
    told = ""
    for headroom in HEADROOMS:
        context.release()
        try:
            with context.engine("long", vram=budget_bytes - headroom) as engine:
                asked = Asked(request, 0, context.scale.name)
                return measure(engine, asked, reached=reached), headroom
        except torch.OutOfMemoryError as error:
            told = str(error)
    raise RuntimeError(f"with {HEADROOMS[-1]:,} bytes left alone: {told}")


def taken(device: torch.device) -> int:
    """Bytes of the card that are taken by anything but this process's allocator."""
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes - free_bytes - torch.cuda.memory_reserved(device)


def allocator(device: torch.device) -> dict[str, Any]:
    """What torch's allocator tells of the last phase: bytes of tensors at the most, as asked for
    and as rounded, and how often it had to give cached memory back and try again."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {
        "requested_bytes": stats["requested_bytes.all.peak"],
        "tensor_bytes": stats["allocated_bytes.all.peak"],
        "reserved_bytes": stats["reserved_bytes.all.peak"],
        "alloc_retries": stats["num_alloc_retries"],
    }


# Formats and attention


def formats(context: Context) -> Iterator[Case]:
    """Every path of a quantised linear, and every attention kernel, on the same inputs."""
    reports = probe(context.device)

    @cache
    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return weight_and_inputs(context)

    for path, report in reports.items():
        yield f"path {path}", lambda report=report: vars(report)  # type: ignore[misc]
    for name in ("bf16", "fp8", "int8", "nf4"):
        for mode in ("exact", "fast"):

            def work(name: str = name, mode: Any = mode) -> dict[str, Any]:
                return product(context, name, mode, working(reports), *operands())

            yield f"{name}, {mode}", work
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def kernel(backend: str = backend) -> dict[str, Any]:
            return attend(context, backend)

        yield f"attention {backend.lower()}", kernel
    yield "attention int8 (comfy-kitchen)", lambda: attend_int8(context)


def weight_and_inputs(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest matrix of a block (on the host) and what it is multiplied with, both random."""
    rows, columns = context.scale.matrix
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw).mul_(0.02).to(torch.bfloat16)
    x = torch.randn(context.scale.tokens, columns, generator=draw)
    return weight, x.to(context.device, torch.bfloat16)


def product(
    context: Context,
    name: str,
    mode: Any,
    works: frozenset[Any],
    weight: torch.Tensor,
    x: torch.Tensor,
) -> dict[str, Any]:
    """Seconds of a linear over ``weight`` in a format."""
    rows, columns = context.scale.matrix
    device, fmt = context.device, get_format(name)
    stored = {suffix: each.to(device) for suffix, each in fmt.quantise(weight).items()}
    computing = Computing(Scratch(2 * rows * columns, device), mode, works)
    path = strategy_for(computing, fmt, (rows, columns))
    operands = Operands(fmt, (rows, columns), stored, None)
    seconds = seconds_of(lambda: path(operands, x), context)
    reference = F.linear(x.float(), weight.to(device).float())
    error = (path(operands, x).float() - reference).norm() / reference.norm()
    flops = 2 * context.scale.tokens * rows * columns
    return {"path": path.path, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12,
            "relative_error": float(error)}  # fmt: skip


HEAD_WIDTH = 128
"""Of the 14B model."""


def attend(context: Context, backend: str) -> dict[str, Any]:
    """Seconds of a chunk of queries against all keys, by one of torch's kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = 1 if backend == "MATH" else context.scale.heads  # its scores would not fit
    q, k, v = (x.transpose(1, 2).contiguous() for x in random_qkv(context, heads))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        seconds = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), context)
    return attended(context, heads, seconds)


def attend_int8(context: Context) -> dict[str, Any]:
    """The same as ``--attention int8`` makes it, its quantising and its copy back included; and its
    error against torch's own."""
    attend_in_8_bits = int8_attention()
    q, k, v = random_qkv(context, context.scale.heads)
    seconds = seconds_of(lambda: attend_in_8_bits(q, k, v), context)
    sdpa_seconds = seconds_of(lambda: attention(q, k, v), context)
    reference = attention(q, k, v).float()
    error = (attend_in_8_bits(q, k, v).float() - reference).norm() / reference.norm()
    return attended(context, context.scale.heads, seconds) | {
        "sdpa_ms": 1e3 * sdpa_seconds,
        "relative_error": float(error),
    }


def random_qkv(context: Context, heads: int) -> list[torch.Tensor]:
    """A chunk of queries, and the keys and values of all tokens: (1, tokens, heads, width)."""
    draw = torch.Generator(device=context.device).manual_seed(0)
    counts = (context.scale.tokens, context.scale.context, context.scale.context)
    return [
        torch.randn(
            (1, tokens, heads, HEAD_WIDTH), generator=draw, device=context.device,
            dtype=torch.bfloat16,
        )
        for tokens in counts
    ]  # fmt: skip


def attended(context: Context, heads: int, seconds: float) -> dict[str, Any]:
    """What is told of attention that took so long."""
    flops = 4 * context.scale.tokens * context.scale.context * heads * HEAD_WIDTH
    return {"heads": heads, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def seconds_of(work: Callable[[], object], context: Context) -> float:
    """The median of some repetitions after one that does not count."""
    work()
    times = []
    for _ in range(context.scale.repeats):
        finish(context)
        started = time.perf_counter()
        work()
        finish(context)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def finish(context: Context) -> None:
    """Wait for the device."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


# VAE


def vae(context: Context) -> Iterator[Case]:
    """Both ways through the VAE at the large size: as the smallest card's plan has it and in fixed
    tiles, each capped at the plan's budget, and whole."""
    smallest = min(context.scale.caps.values()) - context.scale.reserve_bytes
    videos: list[torch.Tensor] = []
    for half in ("decode", "encode"):
        for name, vram, tiles in (
            ("smallest card", smallest, None),
            (f"tiled {context.scale.tiles}", None, context.scale.tiles),
            ("whole", None, "1x1"),
        ):

            def work(
                half: str = half, vram: int | None = vram, tiles: str | None = tiles
            ) -> dict[str, Any]:
                return through_vae(context, half, vram, tiles, videos)

            yield f"{half}, {name}", work


def through_vae(
    context: Context, half: str, vram: int | None, tiles: str | None, videos: list[torch.Tensor]
) -> dict[str, Any]:
    """Random latents decoded, or a grey picture encoded; decoded videos are compared with the
    first."""
    context.release()
    fixed = {} if tiles is None else {"tiles": tiles}
    with context.engine("short", vram=vram, **fixed) as engine, torch.no_grad():
        request = context.request(context.scale.large, 1).with_seed()
        plan = engine.plan(request)
        stage = MeasuredStage(engine.run_of(request, plan), lambda event: None, threading.Event())
        latents = Sampling(stage).latents.cpu()
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(context.device)
        started = time.perf_counter()
        with allocator_capped(context.device, plan.vram_limit_bytes):
            if half == "decode":
                videos.append(decode(stage, latents))
            else:
                encode_condition(stage, Image.new("RGB", (request.width, request.height), "grey"))
        seconds = time.perf_counter() - started
    planned, ledger = plan[half].vram_bytes, stage.device_ledger.peak
    cuda = context.device.type == "cuda"
    allocated = torch.cuda.max_memory_reserved(context.device) if cuda else ledger
    found = {
        "s": seconds,
        "tiles": list(plan[half].tiles),
        "planned_bytes": planned,
        "ledger_bytes": ledger,
        "allocated_bytes": allocated,
        **allocator(context.device),
    }
    return found | (difference(videos) if half == "decode" else {})


def difference(videos: list[torch.Tensor]) -> dict[str, Any]:
    """Of the last video from the first."""
    levels = (videos[-1].int() - videos[0].int()).abs()
    return {
        "largest_difference": int(levels.max()),
        "pixels_that_differ": float((levels > 0).float().mean()),
    }


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
