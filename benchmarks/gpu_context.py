"""What all cases of the GPU suite work with: how large everything is, the models, and what a card
and torch's allocator tell. See `benchmarks.gpu_suite`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from penstock.engine.bench.machine import links
from penstock.engine.bench.result import BenchResult, Links
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.engine import Engine
from penstock.engine.request.generation import GenerationRequest
from penstock.profiles.options import Options
from penstock.units import GIB, MIB

LARGE_CONTEXT_BYTES = 800 * MIB
"""Of a card, for the context and the kernels of an H200: more than a consumer card's take."""

SAMPLE_BYTES = 256 * MIB
"""Read of a model's file, to know what the disk reaches."""

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
        delay_cycles: of the injected delays, in clock passes of the device.
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

    def engine(self, model: str, *, vram: int | None = None, **named: str) -> Engine:
        """A model opened, under a budget or under what is free."""
        options = Options(vram=vram, device=self.scale.device, **named)
        return Engine.open(self.folder / model, options=options)

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


def finish(context: Context) -> None:
    """Wait for the device."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
