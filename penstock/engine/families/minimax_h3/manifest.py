"""MiniMax-H3 as the planner takes it: plain numbers and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from penstock.engine.families.minimax_h3 import plan
from penstock.engine.families.minimax_h3.config import SCHEDULER, SOUND_SHIFT
from penstock.engine.families.minimax_h3.denoise_plan import DENOISE
from penstock.engine.families.minimax_h3.schedule import told
from penstock.engine.families.minimax_h3.sizes import FPS, GRID
from penstock.engine.families.minimax_h3.sound.spec import AudioSpec
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.engine.families.minimax_h3.terms import H3Case
from penstock.engine.families.minimax_h3.text.spec import TextSpec
from penstock.engine.families.minimax_h3.video_vae.spec import ClipVaeSpec
from penstock.engine.model.grid import Grid
from penstock.profiles.manifest import Heads, Pictures, Prefetch, Storage, VideoShape
from penstock.profiles.phases import Noise, Step

REQUEST: Mapping[str, Any] = MappingProxyType(
    {"width": 1344, "height": 768, "frames": 124, "steps": 50, "guidance_scale": 1.0,
     "sampler": "euler", "fps": FPS}
)  # fmt: skip
"""Where a request leaves something open. Source: diffusers' ``MiniMaxH3ModularPipeline``."""

_SMALLER = ((1344, 768), (1088, 608), (864, 480), (640, 352))
_FRAMES = (243, 192, 124)


@dataclass(frozen=True)
class H3Manifest:
    """A model of MiniMax-H3 (`penstock.profiles.phases.Manifest`)."""

    transformer: PackedSpec
    text: TextSpec
    vae: ClipVaeSpec
    audio: AudioSpec

    @property
    def storage(self) -> Storage:
        """As `penstock.profiles.phases.Manifest`: of the transformer's blocks."""
        return self.transformer.storage

    @property
    def image_to_video(self) -> bool:
        """As `penstock.profiles.phases.Manifest`: no picture is needed."""
        return False

    @property
    def grid(self) -> Grid:
        """As `penstock.engine.model.official.Official`."""
        return GRID

    @property
    def pictures(self) -> Pictures:
        """As `penstock.profiles.phases.Manifest`."""
        return Pictures("may", "may")

    @property
    def heads(self) -> Heads:
        """As `penstock.profiles.phases.Manifest`: of the transformer."""
        spec = self.transformer
        return Heads(spec.num_attention_heads, spec.attention_head_dim, spec.weights.itemsize)

    @property
    def request_defaults(self) -> Mapping[str, Any]:
        """As `penstock.engine.model.official.Official`."""
        return REQUEST

    def flow_shift(self, width: int, height: int, asked: float | None) -> float:
        """As `penstock.engine.model.official.Official`: of the video's schedule."""
        return float(SCHEDULER["shift"]) if asked is None else float(asked)

    @property
    def sound_shift(self) -> float:
        """Of the sound's schedule."""
        return SOUND_SHIFT

    def timesteps(self, shape: VideoShape, steps: int, noise: Noise) -> tuple[float, ...]:
        """As `penstock.engine.model.official.Official`: of the video, 0 to 1."""
        return told(steps, self.flow_shift(shape.width, shape.height, noise.shift))

    @property
    def prefetch(self) -> Prefetch:
        """As `penstock.profiles.phases.Manifest`."""
        return Prefetch(DENOISE, "transformer", "", "")  # the VAE's decoder streams as well

    def steps(self, case: H3Case) -> Iterator[Step]:
        """As `penstock.profiles.phases.Manifest`."""
        return plan.steps(case)

    def smaller_shapes(self, shape: VideoShape) -> Iterator[VideoShape]:
        """As `penstock.profiles.phases.Manifest`: fewer frames first, then fewer pixels."""
        upright = shape.height > shape.width
        for sides in ((shape.width, shape.height), *_SMALLER):
            width, height = sides[::-1] if upright and sides in _SMALLER else sides
            for frames in (shape.frames, *_FRAMES):
                fewer = frames <= shape.frames and width * height <= shape.width * shape.height
                if fewer and (width, height, frames) != (shape.width, shape.height, shape.frames):
                    yield VideoShape(width, height, frames)

    def undecided(self) -> H3Manifest:
        """As `penstock.profiles.phases.Manifest`."""
        spec = self.transformer
        return replace(
            self,
            transformer=replace(
                spec,
                storage=replace(spec.storage, path=None),
                table_storage=replace(spec.table_storage, path=None),
            ),
        )
