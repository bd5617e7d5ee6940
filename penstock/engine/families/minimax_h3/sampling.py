"""Where the sampling of a video and its sound stands: both schedules over one packed tensor.

What the transformer gives is turned towards noise when it is packed, so that previews, step caches
and what follows the velocity elsewhere need not know of the makers' sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3 import layout
from penstock.engine.families.minimax_h3.layout import pack, sound_latents, to_rows
from penstock.engine.families.minimax_h3.schedule import Schedule
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.tables import HELD, StepTimes
from penstock.engine.run.sampler import Sampler, SamplerState, check_finite
from penstock.engine.run.sampling import Sampling
from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.engine.run.stage import Stage
    from penstock.engine.run.stepcache import StepCache
    from penstock.profiles.caching import Caching


class PairedSampler(Sampler):
    """Euler's method over both schedules.

    Args:
        levels: of noise: one more than the steps.
        shift, sound_shift: of the two schedules.
        cut: elements of the packed latents that are the video's.
    """

    def __init__(self, levels: int, shift: float, sound_shift: float, cut: int) -> None:
        self.video = Schedule.of(levels, shift)
        self.sound = Schedule.of(levels, sound_shift)
        self._settings = {
            "sampler": "euler", "steps": levels, "shift": shift, "sound_shift": sound_shift,
        }  # fmt: skip
        self.name, self._cut = "euler", cut
        self.timesteps = self.video.timesteps
        self.next_step = 0

    def step(self, noise_pred: Tensor, i: int, latents: Tensor) -> Tensor:
        """As `Sampler.step`."""
        if i != self.next_step or i >= len(self.timesteps):
            raise UsageError(
                "sampler steps must be taken once and in order",
                expected=f"step {self.next_step} of {len(self.timesteps)}",
                found=f"step {i}",
            )
        cut = self._cut
        video = self.video.step(latents[:, :cut], noise_pred[:, :cut], i)
        sound = self.sound.step(latents[:, cut:], noise_pred[:, cut:], i)
        stepped = torch.cat([video, sound], dim=1)
        self.next_step += 1
        check_finite(stepped, i, len(self.timesteps))
        return stepped

    def sigma(self, i: int) -> float:
        """As `Sampler.sigma`: of the video."""
        return float(self.video.sigmas[i])

    def state(self) -> SamplerState:
        """As `Sampler.state`: nothing is carried from step to step."""
        return SamplerState(self._settings | {"next_step": self.next_step}, {})

    def close(self) -> None:
        """As `Sampler.close`."""

    def load_state(self, state: SamplerState) -> None:
        """As `Sampler.load_state`."""
        found = {name: state.values.get(name) for name in self._settings}
        if found != self._settings:
            raise UsageError(
                "the saved sampler state belongs to other settings",
                expected=str(self._settings),
                found=str(found),
                remedy="Continue with the settings the job was started with",
            )
        self.next_step = int(state.values["next_step"])

    def times(self, pictures: bool) -> list[StepTimes]:
        """Return the distinct timesteps of every step."""
        pairs = zip(self.video.timesteps.tolist(), self.sound.timesteps.tolist(), strict=True)
        return [StepTimes.of(video, sound, pictures) for video, sound in pairs]


class PackedSampling(Sampling):
    """As `Sampling`, of packed latents.

    Args:
        stage: the running job.
        sizes: of its latents.
        sound_shift: of the sound's schedule.
        pictures: that are given: their noise is drawn before the video's.
    """

    def __init__(self, stage: Stage, sizes: Latents, sound_shift: float, pictures: int) -> None:
        self._sizes, self._sound_shift, self._pictures = sizes, sound_shift, pictures
        super().__init__(stage)

    def _noise(self, seed: int) -> Tensor:
        sizes, draw = self._sizes, torch.Generator("cpu").manual_seed(seed)
        drawn_for_pictures(sizes, self._pictures, draw)
        video = _normal(draw, 1, sizes.channels, sizes.frames, sizes.height, sizes.width)
        rows = _normal(draw, sizes.sound_rows, sizes.sound_channels)
        return pack(video, sound_latents(rows, sizes))

    def _sampler(self, device: str | None = None) -> PairedSampler:
        request = self._stage.job.request
        shift = self._stage.model.flow_shift(request.width, request.height, request.shift)
        return PairedSampler(request.steps, shift, self._sound_shift, self._sizes.video_elements)

    @property
    def evaluations(self) -> int:
        """Forward passes of the whole job."""
        return len(self._sampler("cpu").timesteps)

    def resume_paired(self, steps: range, caching: Caching) -> tuple[PairedSampler, StepCache]:
        """As `Sampling.resume`."""
        sampler, cache = self.resume(steps, caching)
        assert isinstance(sampler, PairedSampler)
        return sampler, cache


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float32)


def drawn_for_pictures(sizes: Latents, pictures: int, draw: torch.Generator) -> list[Tensor]:
    """Return the noise of given pictures, the first that is drawn of a job: (1, z, 1, h, w)
    each."""
    return [_normal(draw, 1, sizes.channels, 1, sizes.height, sizes.width) for _ in range(pictures)]


def given_rows(condition: Tensor, sizes: Latents, seed: int) -> Tensor:
    """Return the rows of given pictures, with the little noise that the makers hold them at.

    Args:
        condition: their latents, (pictures, z, 1, h, w), fp32 on the CPU.
        seed: of the job.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    held = torch.tensor(HELD, dtype=torch.float32)
    noise = drawn_for_pictures(sizes, len(condition), draw)
    noised = (
        held * picture[None] + (1.0 - held) * each
        for picture, each in zip(condition, noise, strict=True)
    )
    return torch.cat([to_rows(each) for each in noised])


def velocity(video: Tensor, sound: Tensor, sizes: Latents) -> Tensor:
    """Return what is predicted of both kinds of rows, packed and turned towards noise: (1, n),
    fp32."""
    found = pack(layout.from_rows(video.float(), sizes), sound_latents(sound.float(), sizes))
    return found.neg_()


def as_rows(latents: Tensor, sizes: Latents) -> tuple[Tensor, Tensor]:
    """Return packed latents as rows of the video and of the sound."""
    video, sound = layout.unpack(latents, sizes)
    return to_rows(video), layout.sound_rows(sound)
