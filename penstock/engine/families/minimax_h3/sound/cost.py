"""What decoding the sound takes, in closed form, and its phase in a plan.

Bytes are those of live tensors other than weights at the worst moment of the modules beside this
file: never under what is measured, and within 5 % of it at the true shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.engine.families.minimax_h3.sound.spec import AudioSpec
from penstock.engine.families.minimax_h3.terms import latents_bytes, latents_of, sound_bytes
from penstock.profiles.phases import OBJECTS, Group, best_of, loading_s
from penstock.profiles.plan import PhasePlan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import staging_bytes

if TYPE_CHECKING:
    from penstock.engine.families.minimax_h3.terms import H3Case

CHANNELS = 2
"""Of the sound; the VAE is mono, and they are a batch."""

_SINGLE = 4  # bytes of an fp32
_ACTIVATION = 4
"""Times a signal beside its input: twice as many samples, then the same with its ends repeated."""

_ENDS = 64
"""Samples that are repeated at the ends of a signal, all copies of it together."""


def sound_work_bytes(spec: AudioSpec, latents: int) -> int:
    """Return the peak bytes of activations while ``latents`` latents a channel become samples."""
    given = CHANNELS * spec.channels * latents * _SINGLE
    widened = CHANNELS * spec.wide * latents * _SINGLE
    width, length = spec.width, latents
    signal = CHANNELS * width * length * _SINGLE
    most = _made(spec, width * spec.wide * 7) + signal
    for rate, kernel in zip(spec.rates, spec.kernels, strict=True):
        longer = signal * rate // 2
        most = max(most, signal + _made(spec, width * (width // 2) * kernel) + longer)
        width, length, signal = width // 2, length * rate, longer
        ends = CHANNELS * width * _ENDS * _SINGLE
        # The stage's input, the sum of its blocks, a block's input and what its first pair gave
        held = 4 * signal
        inner = max(
            (1 + _ACTIVATION) * signal + ends,
            signal + _made(spec, width * width * max(spec.block_kernels)),
        )
        most = max(most, held + inner)
    return given + widened + most


def _made(spec: AudioSpec, elements: int) -> int:
    """Return a weight as it multiplies, made of its directions and lengths."""
    return 0 if spec.folded else elements * _SINGLE


def sound_flops(spec: AudioSpec, latents: int) -> int:
    """Return the FLOPs of decoding, its filters left out."""
    width, length = spec.width, latents
    total = length * width * spec.wide * 7
    for rate, kernel in zip(spec.rates, spec.kernels, strict=True):
        total += length * width * (width // 2) * kernel
        width, length = width // 2, length * rate
        total += 6 * length * width * width * sum(spec.block_kernels)
    return 2 * CHANNELS * total


def sound_step(case: H3Case) -> DecodeSound:
    """Return the phase "sound"."""
    return DecodeSound(case)


@dataclass(frozen=True)
class DecodeSound:
    """The audio VAE over both channels at once."""

    case: H3Case

    @property
    def phases(self) -> tuple[str, ...]:
        """As `penstock.profiles.phases.Step`."""
        return ("sound",)

    def best(self, limits: Limits) -> Group | None:
        """As `penstock.profiles.phases.Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `penstock.profiles.phases.Step`: there is one way."""
        case, spec = self.case, self.case.manifest.audio
        shape, latents = case.workload.shape, latents_of(case).sound
        weights = spec.weights.rest_bytes
        held = (
            ("latents", latents_bytes(case)),
            ("video frames", 3 * shape.frames * shape.height * shape.width),
            ("sound", sound_bytes(case)),
            OBJECTS,
        )
        room = limits.ram_bytes - sum(nbytes for _, nbytes in held)
        yield (
            PhasePlan(
                "sound",
                weights=(("audio VAE", weights),),
                work=(("activations", sound_work_bytes(spec, latents)), *case.libraries()),
                ram_weights=(("weights staging", staging_bytes(weights, room)),),
                ram_work=held,
                read_bytes=weights,
                copied_bytes=weights,
                seconds=sound_flops(spec, latents) / case.rates.flops
                + loading_s(weights, case.rates),
            ),
        )
