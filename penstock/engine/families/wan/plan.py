"""The phases of a job with Wan, in order, and what each takes; the transformer's two are in
`penstock.engine.families.wan.denoise_plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from penstock.engine.families.wan.cost import encoders, vae
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from penstock.engine.families.wan.denoise_plan import Denoise
from penstock.engine.families.wan.spec import ImageSpec
from penstock.engine.families.wan.stretches import Stretch, shared_caching, stretches_of
from penstock.engine.families.wan.terms import (
    WanCase,
    changes_of,
    condition_bytes,
    decoding_bytes,
    encoder_state_bytes,
    landing_bytes,
    latent_of,
    latents_bytes,
    picture_bytes,
    pictures_of,
    tile_bytes,
)
from penstock.errors import UsageError
from penstock.profiles.phases import (
    OBJECTS,
    Group,
    Mux,
    OnePass,
    Step,
    Workload,
    fitting,
    loading_s,
)
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import Network, staging_bytes
from penstock.profiles.tiling import TileGrid

TILE_GRIDS = (
    (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6), (7, 7), (8, 8),
)  # fmt: skip
"""Rows and columns of VAE tiles that are tried; each costs more arithmetic than the one before."""

SAVED_TILE_COPIES = 2
"""Of a decoded tile's pixels: the file's bytes and their tensor when it is read again; saving takes
one."""

HOLE_SHARES: Mapping[str, float] = MappingProxyType({"decode": 0.25, "encode": 0.4})
"""Of those tensors' bytes: 0.23 and 0.30 to 0.39 were measured likewise."""


def steps(case: WanCase) -> Iterator[Step]:
    """Yield the groups of phases of a job, in the order in which they run: the one place that says
    it."""
    manifest = case.manifest
    yield text_step(case)
    if manifest.image is not None:
        yield image_step(case, manifest.image)
    if manifest.image_to_video or (manifest.tokenwise and pictures_of(case)):
        yield Tiled("encode", case)
    if manifest.second is None:
        yield whole(case)
    else:
        yield from experts(case)
    yield Tiled("decode", case)
    shape = case.workload.shape
    yield Mux(case, shape, (("latents", latents_bytes(case)),))


def whole(case: WanCase) -> Denoise:
    """Return the only transformer, with all steps."""
    work, caching = case.workload, case.policy.caching
    found = stretches_of(case.manifest, work, range(work.steps), caching, guided=work.branches == 2)
    return _denoise(_guided(case, work, found), case, found)


def experts(case: WanCase) -> Iterator[Denoise]:
    """Yield the transformer for much noise, then the one for little, each with its steps; one that
    has none is left out."""
    work = case.workload
    guided = work.guided if work.guided_high is None else work.guided_high, work.guided
    both = work.texts == 2
    high, low = case.manifest.split(work)
    ranges = range(high), range(high, high + low)
    cached = shared_caching(case.manifest, work, case.policy.caching, ranges)
    for number, (steps, on, part) in enumerate(zip(ranges, guided, cached, strict=True)):
        if steps:
            own = replace(work, steps=len(steps), guided=on, guided_high=both)
            found = stretches_of(case.manifest, work, steps, part, guided=on)
            policy = replace(case.policy, step_cache=part.word)
            planned = _guided(replace(case, policy=policy), own, found)
            yield _denoise(planned, case, found, second=number == 1)


def _denoise(
    planned: WanCase, job: WanCase, stretches: tuple[Stretch, ...], *, second: bool = False
) -> Denoise:
    """Return the steps of one transformer, to be planned.

    Args:
        planned: its own.
        job: the whole job's.

    Raises:
        UsageError: the attention that is asked for takes all tokens at once, and here it cannot.
    """
    attending = job.policy.attending
    if attending.backend.whole and job.manifest.tokenwise and pictures_of(job):
        raise UsageError(
            "this attention takes all tokens of a video at once",
            expected="sdpa or int8, where the first frame is given apart from the others",
            found=job.policy.attention,
            remedy="Leave --attention out",
        )
    dense = attending.dense_steps(job.workload.steps)
    return Denoise(planned, second=second, stretches=stretches, dense_steps=dense)


def _guided(case: WanCase, work: Workload, stretches: Sequence[Stretch]) -> WanCase:
    """Return ``case`` with ``work``, which has guidance where one of ``stretches`` has; the texts
    are those of the job."""
    on = any(each.branches == 2 for each in stretches)
    return replace(case, workload=replace(work, guided=on, guided_high=work.texts == 2))


def text_step(case: WanCase) -> OnePass:
    """Return the text encoder."""
    spec, branches = case.manifest.text, case.workload.texts
    work = encoders.text_bytes(spec, prompts=branches)
    return OnePass(
        "text",
        case,
        Network.of(spec.weights.block_bytes, resident=False),
        spec.weights.rest_bytes,
        (("activations", work), *spec.storage.items, *case.libraries()),
        (("encoder states", encoder_state_bytes(case)), OBJECTS),
        encoders.text_flops(spec, prompts=branches),
        visits=branches * spec.num_layers,
        elements=branches * spec.num_layers * TEXT_TOKENS * spec.d_model,
    )


def image_step(case: WanCase, spec: ImageSpec) -> OnePass:
    """Return the image encoder."""
    layers, seen = len(spec.weights.block_bytes), case.manifest.seen
    return OnePass(
        "image",
        case,
        Network.of(spec.weights.block_bytes, resident=False),
        spec.weights.rest_bytes,
        (
            ("activations", encoders.image_bytes(spec, pictures=seen)),
            *spec.storage.items,
            *case.libraries(),
        ),
        (
            ("encoder states", encoder_state_bytes(case)),
            ("picture", decoding_bytes(case)),
            OBJECTS,
        ),
        seen * encoders.image_flops(spec),
        visits=seen * layers,
        elements=seen * layers * spec.tokens * spec.hidden_size,
    )


def _told(grid: TileGrid) -> str:
    if (grid.rows, grid.cols) == (1, 1):
        return "whole frames, no tiles"
    return f"exact tiles, {grid.rows} rows by {grid.cols} columns"


@dataclass(frozen=True)
class Tiled:
    """One half of the VAE, over a grid of tiles.

    Attributes:
        name: "encode" or "decode".
    """

    name: str
    case: WanCase

    @property
    def phases(self) -> tuple[str, ...]:
        """As `Step`."""
        return (self.name,)

    def best(self, limits: Limits) -> Group | None:
        """As `Step`: grids come from the fastest on, so the first that fits is the best."""
        return next(fitting(self.all_small(limits), limits), None)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: all grids."""
        for grid in self._grids():
            yield (self._phase(grid, limits),)

    def _grids(self) -> Iterator[TileGrid]:
        _, height, width = latent_of(self.case)
        fixed = self.case.policy.tiles
        wanted = TILE_GRIDS if fixed is None else (fixed,)
        seen: set[TileGrid] = set()
        for rows, columns in wanted:
            grid = TileGrid(min(rows, height), min(columns, width))
            if grid not in seen:
                seen.add(grid)
                yield grid

    def _phase(self, grid: TileGrid, limits: Limits) -> PhasePlan:
        rates, spec, latent = self.case.rates, self.case.manifest.vae, latent_of(self.case)
        decoding, on_cpu = self.name == "decode", self.case.device == "cpu"
        if not decoding and self.case.manifest.tokenwise:
            latent = (1, *latent[1:])  # the picture alone
        weights = spec.decoder if decoding else spec.encoder
        of, size = (spec, latent, grid), weights.itemsize
        if decoding:
            found, work = vae.decode_bytes(*of, size, on_cpu=on_cpu), vae.decode_work(*of)
        else:
            changes = changes_of(self.case)
            found = vae.encode_bytes(*of, size, changes=changes, on_cpu=on_cpu)
            work = vae.encode_work(*of, changes=changes)
        held = (*found.ram, ("latents", latents_bytes(self.case)), OBJECTS) if decoding else (
            ("encoder states", encoder_state_bytes(self.case)),
            ("picture", self._picture_bytes()),
            ("condition", condition_bytes(self.case)),
            OBJECTS,
        )  # fmt: skip
        if decoding and self.case.workload.saved:
            held = (*held, ("saved tile", SAVED_TILE_COPIES * tile_bytes(self.case, grid)))
        if decoding and not on_cpu:
            piece = tile_bytes(self.case, grid) // self.case.workload.shape.frames
            held = (*held, ("frames being copied", landing_bytes(piece)))
        room = limits.ram_bytes - sum(count for _, count in held)
        return PhasePlan(
            self.name,
            weights=((f"VAE {self.name}r", weights.rest_bytes),),
            work=(*found.device, *self._gpu_items(found, weights.rest_bytes)),
            ram_weights=(("weights staging", staging_bytes(weights.rest_bytes, room)),),
            ram_work=held,
            tiles=(grid.rows, grid.cols),
            read_bytes=weights.rest_bytes,
            copied_bytes=weights.rest_bytes,
            seconds=work.seconds(rates) + loading_s(weights.rest_bytes, rates),
            facts=(_told(grid),),
        )

    def _picture_bytes(self) -> int:
        """Count the picture's bytes: it is decoded in the first phase that sees it."""
        decoded = self.case.manifest.image is not None
        return picture_bytes(self.case) if decoded else decoding_bytes(self.case)

    def _gpu_items(self, found: vae.VaeBytes, weight_bytes: int) -> Items:
        libraries = self.case.libraries(found.convolution_bytes)
        tensors = weight_bytes + found.device_bytes + found.convolution_bytes
        return (*libraries, *self.case.holes(HOLE_SHARES[self.name], tensors))
