"""From a model, a workload and a machine to a plan: search what fits, take the fastest.

Pure functions. For every phase a list of candidates is made (how many CFG branches at once, tokens
a chunk, tile grid, slots, residents); those above a budget are dropped; of the rest the one with
the least predicted seconds wins, ties going to fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.errors import OverBudget
from penstock.profiles.cost import encoders, transformer, vae
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import ModelManifest, VideoShape, Weights
from penstock.profiles.plan import Items, PhasePlan, Plan, StreamPlan
from penstock.units import MIB, format_bytes

CHUNKS = (1 << 16, 1 << 15, 1 << 14, 1 << 13, 4096, 2048, 1024, 512, 256, 128, 64)
"""Tokens a chunk of the DiT forward that are tried, besides "all in one chunk"."""

TILE_GRIDS = (
    (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6), (7, 7), (8, 8),
)  # fmt: skip
"""Rows and columns of VAE tiles that are tried, fewest first."""

CHUNK_SECONDS = 2e-4
"""Launch cost of one chunk of one block."""

RING = (3, 2, 1)
"""Sizes of the device ring and of the host ring that are tried."""


@dataclass(frozen=True)
class Workload:
    """What is asked of the model: the video's shape, the steps, and whether CFG is on."""

    shape: VideoShape
    steps: int
    guided: bool

    @property
    def branches(self) -> int:
        """Forward passes a step."""
        return 2 if self.guided else 1


def plan(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Plan:
    """The fastest plan inside the budgets of ``hardware``.

    Raises:
        OverBudget: none fits; names the phase's need, the limit and the largest consumer.
    """
    phases = (
        _choose(name, candidates(), hardware)
        for name, candidates in _phases(manifest, workload, hardware).items()
    )
    return Plan(tuple(phases), hardware.vram_bytes, hardware.ram_bytes)


def minimum_bytes(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> tuple[int, int]:
    """The least VRAM and the least RAM (each with the other unlimited) that any plan needs."""
    phases = [list(make()) for make in _phases(manifest, workload, hardware).values()]
    return (
        max(min(c.vram_bytes for c in candidates) for candidates in phases),
        max(min(c.ram_bytes for c in candidates) for candidates in phases),
    )


def _phases(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Mapping[str, Callable[[], Iterator[PhasePlan]]]:
    phases = {"text": lambda: _text(manifest, workload, hardware)}
    if manifest.image is not None:
        phases["image"] = lambda: _image(manifest, hardware)
    if manifest.transformer.in_channels > manifest.vae.z_dim:
        phases["encode"] = lambda: _encode(manifest, workload, hardware)
    phases["denoise"] = lambda: _denoise(manifest, workload, hardware)
    phases["decode"] = lambda: _decode(manifest, workload, hardware)
    return phases


def _choose(name: str, candidates: Iterable[PhasePlan], hardware: Hardware) -> PhasePlan:
    seen = list(candidates)
    fits_ram = [c for c in seen if c.ram_bytes <= hardware.ram_bytes]
    fits = [c for c in fits_ram if c.vram_bytes <= hardware.vram_bytes]
    if fits:
        return min(fits, key=lambda c: (c.seconds, c.vram_bytes + c.ram_bytes))
    if fits_ram:
        least = min(fits_ram, key=lambda c: c.vram_bytes)
        raise _over("VRAM", name, least.vram, hardware.vram_bytes)
    least = min(seen, key=lambda c: c.ram_bytes)
    raise _over("RAM", name, least.ram, hardware.ram_bytes)


def _over(resource: str, phase: str, items: Items, limit_bytes: int) -> OverBudget:
    need = sum(count for _, count in items)
    flag = "--vram" if resource == "VRAM" else "--ram"
    return OverBudget(
        resource,
        need,
        limit_bytes,
        [(f"{phase}: {label}", count) for label, count in items],
        remedy=f"Give {flag} {format_bytes(need)} or more, or ask for a smaller or shorter video.",
    )


def _text(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Iterator[PhasePlan]:
    spec = manifest.text
    work = encoders.text_bytes(spec, prompts=workload.branches)
    flops = encoders.text_flops(spec) * workload.branches
    yield from _one_pass("text", spec.weights, work, flops, hardware)


def _image(manifest: ModelManifest, hardware: Hardware) -> Iterator[PhasePlan]:
    spec = manifest.image
    assert spec is not None
    work = encoders.image_bytes(spec)
    yield from _one_pass("image", spec.weights, work, encoders.image_flops(spec), hardware)


def _one_pass(
    name: str, weights: Weights, work: Items, flops: float, hardware: Hardware
) -> Iterator[PhasePlan]:
    """Candidates of a network whose blocks are visited once: nothing is worth keeping."""
    block = max(weights.block_bytes)
    n_blocks = len(weights.block_bytes)
    for slots in RING:
        for slabs in RING:
            stream = StreamPlan(
                n_blocks, device_slots=min(slots, n_blocks), host_slabs=min(slabs, n_blocks)
            )
            yield _timed(
                PhasePlan(
                    name,
                    vram=_vram(weights, stream, block) + work,
                    ram=_ram(weights, stream, block),
                    stream=stream,
                ),
                block,
                passes=1,
                pass_flops=flops,
                hardware=hardware,
            )


def _encode(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Iterator[PhasePlan]:
    spec = manifest.vae
    grid = workload.shape.latent(spec)
    for tiles in _tile_grids(grid):
        yield PhasePlan(
            "encode",
            vram=(("VAE encoder", spec.encoder.rest_bytes), *vae.encode_bytes(spec, grid, tiles)),
            ram=(("staging", _staging(spec.encoder)),),
            tiles=tiles,
            seconds=vae.encode_flops(spec, grid, tiles) / hardware.flops
            + spec.encoder.rest_bytes / hardware.read_bytes_per_s,
        )


def _decode(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Iterator[PhasePlan]:
    spec = manifest.vae
    shape = workload.shape
    grid = shape.latent(spec)
    video_bytes = 3 * shape.frames * shape.height * shape.width
    for tiles in _tile_grids(grid):
        yield PhasePlan(
            "decode",
            vram=(("VAE decoder", spec.decoder.rest_bytes), *vae.decode_bytes(spec, grid, tiles)),
            ram=(("staging", _staging(spec.decoder)), ("video frames", video_bytes)),
            tiles=tiles,
            seconds=vae.decode_flops(spec, grid, tiles) / hardware.flops
            + spec.decoder.rest_bytes / hardware.read_bytes_per_s,
        )


def _tile_grids(grid: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    _, height, width = grid
    for rows, columns in TILE_GRIDS:
        if rows <= height and columns <= width:
            yield rows, columns


def _denoise(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Iterator[PhasePlan]:
    spec = manifest.transformer
    grid = workload.shape.latent(manifest.vae)
    tokens = workload.shape.tokens(manifest.vae, spec)
    chunks = [tokens, *(c for c in CHUNKS if c < tokens)]
    for branches in range(workload.branches, 0, -1):
        for chunk in chunks:
            for on_device in (True, False):
                work = transformer.denoise_bytes(
                    spec,
                    grid,
                    chunk_tokens=chunk,
                    branches=branches,
                    total_branches=workload.branches,
                    image_tokens=0 if manifest.image is None else manifest.image.tokens,
                    cross_kv_on_device=on_device,
                )
                yield from _placements(manifest, workload, hardware, branches, chunk, work)


def _vram(weights: Weights, stream: StreamPlan, block: int) -> Items:
    return (
        ("non-block weights", weights.rest_bytes),
        ("resident blocks", stream.device_resident * block),
        ("block slots", stream.device_slots * block),
    )


def _ram(weights: Weights, stream: StreamPlan, block: int) -> Items:
    return (
        ("resident blocks", stream.host_resident * block),
        ("block slabs", stream.host_slabs * block),
        ("staging", _staging(weights)),
    )


def _staging(weights: Weights) -> int:
    return min(weights.rest_bytes, 64 * MIB)
