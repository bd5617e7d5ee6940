"""Memory of a card, for the GPU suite: a step under caps with the rest of the card held, and both
ways through the VAE."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu_context import (
    Case,
    Context,
    allocator,
    speed,
    taken,
    written,
)
from penstock.engine.bench.measure import Asked, MeasuredStage, measure
from penstock.engine.bench.result import BenchResult, Links
from penstock.engine.families.wan.clip import preprocess
from penstock.engine.families.wan.work import decode, encode_condition
from penstock.engine.run.sampling import Sampling
from penstock.offload.allocator import allocator_capped
from penstock.profiles.phases import FIRST_FRAME
from penstock.units import MIB

HEADROOMS = (0, 256 * MIB, 768 * MIB)
"""Tried one after the other where the plan's own peak does not fit the card."""


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
                grey = Image.new("RGB", (request.width, request.height), "grey")
                encode_condition(stage, [preprocess(grey, request.width, request.height)])
        seconds = time.perf_counter() - started
    planned, ledger = plan[half].vram_bytes, stage.device_ledger.peak
    cuda = context.device.type == "cuda"
    allocated = torch.cuda.max_memory_reserved(context.device) if cuda else ledger
    found = {
        "s": seconds,
        "tiles": list(plan[half].tiles),
        "changes": list(FIRST_FRAME),
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
