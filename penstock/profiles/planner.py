"""From a model, a workload and a machine to a plan: search what fits, take the fastest.

Pure functions. For every phase a list of candidates is made (how many CFG branches at once, tokens
a chunk, tile grid, slots, residents); those above a budget are dropped; of the rest the one with
the least predicted seconds wins, ties going to fewer bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from penstock.errors import OverBudget
from penstock.profiles.cost import encoders, transformer, vae
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import (
    ImageSpec,
    ModelManifest,
    TransformerSpec,
    VaeSpec,
    VideoShape,
    Weights,
)
from penstock.profiles.plan import Items, PhasePlan, Plan, StreamPlan
from penstock.profiles.tiling import TileGrid
from penstock.units import MIB, format_bytes

CHUNKS = (1 << 16, 1 << 15, 1 << 14, 1 << 13, 4096, 2048, 1024, 512, 256, 128, 64)
"""Tokens a chunk of the DiT forward that are tried, besides "all in one chunk"."""

TILE_GRIDS = (
    (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6), (7, 7), (8, 8),
)  # fmt: skip
"""Rows and columns of VAE tiles that are tried, fewest first."""

STAGING_BYTES = 64 * MIB
"""Host buffer that non-block weights are read through."""

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


Group = tuple[PhasePlan, ...]
"""Phases that are planned together, because what the first leaves behind lives on in the next."""


def plan(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Plan:
    """The fastest plan inside the budgets of ``hardware``.

    Raises:
        OverBudget: none fits; names the phase's need, the limit and the largest consumer.
    """
    chosen = [_choose(candidates, hardware) for candidates in _groups(manifest, workload, hardware)]
    phases = tuple(phase for group in chosen for phase in group)
    return Plan(phases, hardware.vram_bytes, hardware.ram_bytes)


def minimum_vram_bytes(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> int:
    """The least VRAM that any plan needs inside the RAM budget of ``hardware``.

    Raises:
        OverBudget: no plan fits the RAM budget, whatever the VRAM.
    """
    tight = replace(hardware, vram_bytes=0)
    need = 0
    for candidates in _groups(manifest, workload, tight):
        seen = [c for c in candidates if _ram_bytes(c) <= hardware.ram_bytes]
        if not seen:
            _choose(candidates, hardware)
        need = max(need, min(map(_vram_bytes, seen)))
    return need


SHRINK = 0.9
"""How much of the memory that ran out a smaller plan may take: fewer attempts than block by block."""


def smaller(
    manifest: ModelManifest, workload: Workload, hardware: Hardware, current: Plan, phase: str,
    resource: str,
) -> Plan | None:  # fmt: skip
    """``current`` with the group of ``phase`` replaced by one that takes less memory.

    Plans with the same chunk of tokens are preferred, as their results are the same to the bit:
    fewer residents, smaller rings, fewer branches a visit, smaller tiles. Every call gives strictly
    less, so that repeated calls come to an end.

    Args:
        manifest, workload, hardware: as for `plan`; the budgets still hold.
        current: the plan under which memory ran out.
        phase: where it ran out.
        resource: what ran out: ``"VRAM"``, ``"RAM"`` or ``"memory"`` (both are one).

    Returns:
        The new plan, or None: nothing smaller exists.
    """
    measure = {"VRAM": _vram_bytes, "RAM": _ram_bytes, "memory": _all_bytes}[resource]
    names = _group_names(manifest, workload, hardware, phase)
    held = tuple(current[name] for name in names)
    bytes_now = measure(held)
    for exact in (True, False):
        for limit_bytes in (int(SHRINK * bytes_now), bytes_now - 1):
            found = [
                group
                for group in _under(manifest, workload, hardware, resource, limit_bytes)
                if tuple(p.name for p in group) == names
                and measure(group) <= limit_bytes
                and _vram_bytes(group) <= hardware.vram_bytes
                and _ram_bytes(group) <= hardware.ram_bytes
                and (not exact or group[-1].chunk_tokens == held[-1].chunk_tokens)
            ]
            if found:
                return current.with_phases(min(found, key=_preference))
    return None


def _all_bytes(group: Group) -> int:
    return max(phase.vram_bytes + phase.ram_bytes for phase in group)


def _group_names(
    manifest: ModelManifest, workload: Workload, hardware: Hardware, phase: str
) -> tuple[str, ...]:
    for candidates in _groups(manifest, workload, hardware):
        names = tuple(p.name for p in candidates[0])
        if phase in names:
            return names
    raise ValueError(f"no phase {phase}")


def _under(
    manifest: ModelManifest, workload: Workload, hardware: Hardware, resource: str, limit_bytes: int
) -> Iterator[Group]:
    """Candidates made for tighter budgets: with fewer residents than the machine would allow."""
    vram_bytes, ram_bytes = hardware.vram_bytes, hardware.ram_bytes
    budgets = {
        "VRAM": [(limit_bytes, ram_bytes)],
        "RAM": [(vram_bytes, limit_bytes)],
        "memory": [(limit_bytes // 2, limit_bytes // 2), (limit_bytes, 0), (0, 0)],
    }[resource]
    for vram, ram in budgets:
        tight = replace(
            hardware, vram_bytes=min(vram, vram_bytes), ram_bytes=min(ram, ram_bytes)
        )
        for candidates in _groups(manifest, workload, tight):
            yield from candidates


def _groups(
    manifest: ModelManifest, workload: Workload, hardware: Hardware
) -> Iterator[list[Group]]:
    yield list(_text(manifest, workload, hardware))
    if manifest.image is not None:
        yield list(_image(manifest.image, hardware))
    if manifest.transformer.in_channels > manifest.vae.z_dim:
        yield list(_encode(manifest.vae, workload, hardware))
    yield list(_denoise(manifest, workload, hardware))
    yield list(_decode(manifest.vae, workload, hardware))


def _vram_bytes(group: Group) -> int:
    return max(phase.vram_bytes for phase in group)


def _ram_bytes(group: Group) -> int:
    return max(phase.ram_bytes for phase in group)


def _choose(candidates: list[Group], hardware: Hardware) -> Group:
    fits_ram = [c for c in candidates if _ram_bytes(c) <= hardware.ram_bytes]
    fits = [c for c in fits_ram if _vram_bytes(c) <= hardware.vram_bytes]
    if fits:
        return min(fits, key=_preference)
    if fits_ram:
        worst = max(min(fits_ram, key=_vram_bytes), key=lambda phase: phase.vram_bytes)
        raise _over("VRAM", worst.name, worst.weights + worst.work, hardware.vram_bytes)
    worst = max(min(candidates, key=_ram_bytes), key=lambda phase: phase.ram_bytes)
    raise _over("RAM", worst.name, worst.ram, hardware.ram_bytes)


def _preference(group: Group) -> tuple[float, int]:
    return sum(phase.seconds for phase in group), _vram_bytes(group) + _ram_bytes(group)


def _over(resource: str, phase: str, items: Items, limit_bytes: int) -> OverBudget:
    need = sum(count for _, count in items)
    flag = "--vram" if resource == "VRAM" else "--ram"
    return OverBudget(
        resource,
        need,
        limit_bytes,
        [(f"{phase}: {label}", count) for label, count in items],
        remedy=f"Give {flag} {need} ({format_bytes(need)}) or more, "
        "or ask for a smaller or shorter video",
    )


def _text(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Iterator[Group]:
    spec = manifest.text
    work = (("activations", encoders.text_bytes(spec, prompts=workload.branches)),)
    traffic = Traffic(spec.weights, flops=encoders.text_flops(spec, prompts=workload.branches))
    for phase in _one_pass("text", spec.weights.block_bytes, work, traffic, hardware):
        yield (phase,)


def _image(spec: ImageSpec, hardware: Hardware) -> Iterator[Group]:
    work = (("activations", encoders.image_bytes(spec)),)
    traffic = Traffic(spec.weights, flops=encoders.image_flops(spec))
    for phase in _one_pass("image", spec.weights.block_bytes, work, traffic, hardware):
        yield (phase,)


def _one_pass(
    name: str,
    block_bytes: tuple[int, ...],
    work: Items,
    traffic: Traffic,
    hardware: Hardware,
    ram: Items = (),
) -> Iterator[PhasePlan]:
    """Candidates for blocks that are visited once: nothing is worth keeping."""
    n_blocks = len(block_bytes)
    for slots in RING:
        for slabs in RING:
            stream = StreamPlan(
                n_blocks, device_slots=min(slots, n_blocks), host_slabs=min(slabs, n_blocks)
            )
            base = PhasePlan(name, (), work, ram, stream)
            yield _streamed(base, block_bytes, traffic, hardware)


def _encode(spec: VaeSpec, workload: Workload, hardware: Hardware) -> Iterator[Group]:
    grid = workload.shape.latent(spec)
    for tiles in _tile_grids(grid):
        yield (
            PhasePlan(
                "encode",
                weights=(("VAE encoder", spec.encoder.rest_bytes),),
                work=vae.encode_bytes(spec, grid, tiles, spec.encoder.itemsize).device,
                ram=(("staging", staging_bytes(spec.encoder)),),
                tiles=(tiles.rows, tiles.cols),
                seconds=_loaded(vae.encode_flops(spec, grid, tiles), spec.encoder, hardware),
            ),
        )


def _decode(spec: VaeSpec, workload: Workload, hardware: Hardware) -> Iterator[Group]:
    grid = workload.shape.latent(spec)
    for tiles in _tile_grids(grid):
        work = vae.decode_bytes(spec, grid, tiles, spec.decoder.itemsize)
        yield (
            PhasePlan(
                "decode",
                weights=(("VAE decoder", spec.decoder.rest_bytes),),
                work=work.device,
                ram=(*work.ram, ("weights staging", staging_bytes(spec.decoder))),
                tiles=(tiles.rows, tiles.cols),
                seconds=_loaded(vae.decode_flops(spec, grid, tiles), spec.decoder, hardware),
            ),
        )


def _loaded(flops: float, weights: Weights, hardware: Hardware) -> float:
    return flops / hardware.flops + weights.rest_bytes / hardware.read_bytes_per_s


def _tile_grids(grid: tuple[int, int, int]) -> Iterator[TileGrid]:
    _, height, width = grid
    for rows, columns in TILE_GRIDS:
        if rows <= height and columns <= width:
            yield TileGrid(rows, columns)


def _denoise(manifest: ModelManifest, workload: Workload, hardware: Hardware) -> Iterator[Group]:
    """The two phases of the transformer, which share its non-block weights and the context."""
    spec = manifest.transformer
    for case in _denoise_cases(manifest, workload):
        work = _denoise_work(spec, case)
        traffic = _denoise_traffic(manifest, workload, case)
        for context in _contexts(spec, case, hardware):
            for stream in _placements(spec.weights, work, hardware):
                base = replace(work, stream=stream)
                yield context, _streamed(base, spec.weights.block_bytes, traffic, hardware)


def _denoise_cases(
    manifest: ModelManifest, workload: Workload
) -> Iterator[transformer.DenoiseCase]:
    tokens = workload.shape.tokens(manifest.vae, manifest.transformer)
    for branches in range(workload.branches, 0, -1):
        for chunk in (tokens, *(c for c in CHUNKS if c < tokens)):
            for on_device in (True, False):
                yield transformer.DenoiseCase(
                    latent=workload.shape.latent(manifest.vae),
                    chunk_tokens=chunk,
                    branches=workload.branches,
                    visit_branches=branches,
                    steps=workload.steps,
                    image_tokens=0 if manifest.image is None else manifest.image.tokens,
                    cross_kv_on_device=on_device,
                )


def _denoise_work(spec: TransformerSpec, case: transformer.DenoiseCase) -> PhasePlan:
    return PhasePlan(
        "denoise",
        weights=(),
        work=transformer.denoise_bytes(spec, case).items,
        ram=_host_cross(spec, case),
        chunk_tokens=case.chunk_tokens,
        branches=case.visit_branches,
        cross_kv_on_device=case.cross_kv_on_device,
    )


def _host_cross(spec: TransformerSpec, case: transformer.DenoiseCase) -> Items:
    if case.cross_kv_on_device:
        return ()
    return (("cross-attention K/V", transformer.cross_kv_bytes(spec, case)),)


def _denoise_traffic(
    manifest: ModelManifest, workload: Workload, case: transformer.DenoiseCase
) -> Traffic:
    spec = manifest.transformer
    tokens = workload.shape.tokens(manifest.vae, spec)
    flops = transformer.denoise_flops(spec, tokens, case.image_tokens).total
    chunks = -(-tokens // case.chunk_tokens)
    return Traffic(
        spec.weights,
        flops=flops * case.visit_branches,
        passes=workload.steps * -(-workload.branches // case.visit_branches),
        launch_seconds=CHUNK_SECONDS * chunks * spec.num_layers * case.visit_branches,
        copied_bytes=sum(count for _, count in _host_cross(spec, case)),
    )


def _contexts(
    spec: TransformerSpec, case: transformer.DenoiseCase, hardware: Hardware
) -> list[PhasePlan]:
    """The one best way to compute the context that fits, or else the smallest one."""
    traffic = Traffic(spec.weights, flops=0.0)
    work = transformer.context_bytes(spec, case).items
    ram = _host_cross(spec, case)
    found = [
        replace(phase, cross_kv_on_device=case.cross_kv_on_device)
        for phase in _one_pass("context", spec.cross_block_bytes, work, traffic, hardware, ram)
    ]
    fits = [
        phase
        for phase in found
        if phase.vram_bytes <= hardware.vram_bytes and phase.ram_bytes <= hardware.ram_bytes
    ]
    if fits:
        return [min(fits, key=lambda phase: _preference((phase,)))]
    return [min(found, key=lambda phase: (phase.vram_bytes, phase.ram_bytes))]


def _placements(weights: Weights, work: PhasePlan, hardware: Hardware) -> Iterator[StreamPlan]:
    """Rings of every size, each with as many residents as the budgets leave room for."""
    n_blocks, block = len(weights.block_bytes), max(weights.block_bytes)
    vram_room = hardware.vram_bytes - work.work_bytes - weights.rest_bytes
    ram_room = hardware.ram_bytes - work.ram_bytes - staging_bytes(weights)
    for slots in (0, *RING):
        if slots == 0 and vram_room < n_blocks * block:
            continue
        on_device = n_blocks if slots == 0 else _clamp(vram_room // block - slots, n_blocks - slots)
        left = n_blocks - on_device
        for slabs in (0, *RING):
            if slabs == 0 and left and ram_room < left * block:
                continue
            if slabs > left:
                continue
            in_ram = left if slabs == 0 else _clamp(ram_room // block - slabs, left - slabs)
            yield StreamPlan(n_blocks, on_device, in_ram, min(slots, left), slabs)


def _clamp(value: int, high: int) -> int:
    return max(0, min(value, high))


@dataclass(frozen=True)
class Traffic:
    """What a pass over all blocks takes besides the bytes that lie still.

    Attributes:
        flops: operations of one pass.
        passes: how often all blocks are visited.
        launch_seconds: fixed cost of one pass.
        copied_bytes: copied to the device in one pass besides the blocks.
    """

    weights: Weights
    flops: float
    passes: int = 1
    launch_seconds: float = 0.0
    copied_bytes: int = 0


def _streamed(
    phase: PhasePlan, block_bytes: tuple[int, ...], traffic: Traffic, hardware: Hardware
) -> PhasePlan:
    """``phase`` with the bytes and the seconds that follow from its stream."""
    weights, stream = traffic.weights, phase.stream
    assert stream is not None
    block = max(block_bytes)
    compute = traffic.flops / hardware.flops + traffic.launch_seconds
    streamed = stream.n_blocks - stream.device_resident
    copy = (streamed * block + traffic.copied_bytes) / hardware.copy_bytes_per_s
    read = stream.disk_blocks * block / hardware.read_bytes_per_s
    one_pass, bound = _overlap(compute, copy, read, stream)
    first = (weights.rest_bytes + sum(block_bytes)) / hardware.read_bytes_per_s
    return replace(
        phase,
        weights=(
            ("non-block weights", weights.rest_bytes),
            ("resident blocks", stream.device_resident * block),
            ("block slots", stream.device_slots * block),
        ),
        ram=(
            *phase.ram,
            ("resident blocks", stream.host_resident * block),
            ("block slabs", stream.host_slabs * block),
            ("staging", staging_bytes(weights)),
        ),
        seconds=first + traffic.passes * one_pass,
        bound=bound,
    )


def _overlap(compute: float, copy: float, read: float, stream: StreamPlan) -> tuple[float, str]:
    """Seconds of a pass and what bounds it: a ring of one cannot work ahead."""
    bound = max((compute, "compute"), (copy, "copy"), (read, "read"))[1]
    if stream.device_slots == 1:
        compute = copy = compute + copy
    if stream.host_slabs == 1:
        read = copy = read + copy
    return max(compute, copy, read), bound


def staging_bytes(weights: Weights) -> int:
    """Host memory through which weights outside the blocks are read."""
    return min(weights.rest_bytes, STAGING_BYTES)
