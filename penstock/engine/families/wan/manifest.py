"""Wan as the planner takes it, and how its files become that: plain numbers and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.engine.families.wan import defaults, plan
from penstock.engine.families.wan.denoise_plan import named
from penstock.engine.families.wan.spec import TransformerSpec, WanSpec
from penstock.engine.families.wan.terms import WanCase
from penstock.engine.model.grid import Grid
from penstock.engine.request.levels import noise_levels, steps_above, timesteps
from penstock.profiles.manifest import Heads, Pictures, Prefetch, Storage, VideoShape
from penstock.profiles.phases import Noise, Step, Workload

_FRAMES = (81, 65, 49, 33, 17)
_AREA_480P = (832, 480)


@dataclass(frozen=True)
class WanManifest(WanSpec):
    """A model of Wan as the planner takes it (`penstock.profiles.phases.Manifest`)."""

    @property
    def storage(self) -> Storage:
        """As `penstock.profiles.phases.Manifest`: of the transformer's blocks."""
        return self.transformer.storage

    @property
    def image_to_video(self) -> bool:
        """As `penstock.profiles.phases.Manifest`: the model has 36 input channels."""
        return self.transformer.in_channels > self.vae.z_dim

    @property
    def grid(self) -> Grid:
        """As `penstock.engine.model.official.Official`."""
        return Grid(
            side=self.vae.spatial_factor * max(self.transformer.patch_size[1:]),
            temporal=self.vae.temporal_factor,
        )

    @property
    def pictures(self) -> Pictures:
        """As `penstock.profiles.phases.Manifest`."""
        if self.tokenwise:
            return Pictures("may")
        if not self.image_to_video:
            return Pictures("none")
        if self.transformer.pos_embed:
            return Pictures("must", "must")
        # A model without an image encoder sees both pictures by their latents alone
        return Pictures("must", "may" if self.image is None else "none")

    @property
    def heads(self) -> Heads:
        """As `penstock.profiles.phases.Manifest`: of the transformer."""
        spec = self.transformer
        return Heads(spec.num_attention_heads, spec.attention_head_dim, spec.weights.itemsize)

    @property
    def request_defaults(self) -> Mapping[str, Any]:
        """As `penstock.engine.model.official.Official`."""
        return defaults.request_defaults(
            image_to_video=self.image_to_video, dim=self.transformer.inner_dim, release=self.release
        )

    def flow_shift(self, width: int, height: int, asked: float | None) -> float:
        """As `penstock.engine.model.official.Official`."""
        return defaults.flow_shift(
            width,
            height,
            asked,
            image_to_video=self.image_to_video,
            dim=self.transformer.inner_dim,
            release=self.release,
        )

    def timesteps(self, shape: VideoShape, steps: int, noise: Noise) -> tuple[float, ...]:
        """As `penstock.engine.model.official.Official`."""
        return timesteps(self.levels(shape, steps, noise), noise.sampler)

    def levels(self, shape: VideoShape, steps: int, noise: Noise) -> tuple[float, ...]:
        """Return the share of noise before each step of a job."""
        shift = self.flow_shift(shape.width, shape.height, noise.shift)
        return noise_levels(noise.sampler, steps, shift, distilled=noise.distilled)

    @property
    def release(self) -> str:
        """A key of `penstock.engine.families.wan.defaults.RELEASES`; "" for the first models."""
        if self.second is not None:
            return "i2v-a14b" if self.image_to_video else "t2v-a14b"
        if self.tokenwise:
            return "ti2v-5b"
        return "flf2v" if self.transformer.pos_embed else ""

    @property
    def prefetch(self) -> Prefetch:
        """As `penstock.profiles.phases.Manifest`."""
        then = () if self.second is None else (named("denoise", second=True), "transformer_2")
        return Prefetch("denoise", "transformer", "decode", "vae decoder", *then)

    def split(self, workload: Workload) -> tuple[int, int]:
        """Return steps of the transformer for much noise, and of the one for little."""
        told = self.timesteps(workload.shape, workload.steps, workload.noise)
        boundary = (
            defaults.BOUNDARIES[self.image_to_video] if self.boundary is None else self.boundary
        )
        high = steps_above(boundary, told)
        return high, workload.steps - high

    def steps(self, case: WanCase) -> Iterator[Step]:
        """As `penstock.profiles.phases.Manifest`."""
        return plan.steps(case)

    def with_whole_blocks(self, block_bytes: tuple[int, ...], beside_bytes: int) -> WanManifest:
        """As a transformer runs whose cross-attention K/V are made block by block.

        Args:
            block_bytes: of whole blocks.
            beside_bytes: of the context, which lies beside the steps.
        """
        spec = self.transformer
        rest_bytes = spec.weights.rest_bytes + beside_bytes
        weights = replace(spec.weights, rest_bytes=rest_bytes, block_bytes=block_bytes)
        return replace(self, transformer=replace(spec, weights=weights))

    def smaller_shapes(self, shape: VideoShape) -> Iterator[VideoShape]:
        """Yield fewer frames first, then 480p, each with fewer tokens than ``shape``."""
        low = _AREA_480P if shape.width >= shape.height else _AREA_480P[::-1]
        for width, height in ((shape.width, shape.height), low):
            for frames in (shape.frames, *_FRAMES):
                fewer = frames <= shape.frames and width * height <= shape.width * shape.height
                if fewer and (width, height, frames) != (shape.width, shape.height, shape.frames):
                    yield VideoShape(width, height, frames)

    def undecided(self) -> WanManifest:
        """As `penstock.profiles.phases.Manifest`."""
        second = None if self.second is None else _undecided(self.second)
        return replace(self, transformer=_undecided(self.transformer), second=second)


def _undecided(spec: TransformerSpec) -> TransformerSpec:
    context = spec.context_storage
    return replace(
        spec,
        storage=replace(spec.storage, path=None),
        context_storage=None if context is None else replace(context, path=None),
    )
