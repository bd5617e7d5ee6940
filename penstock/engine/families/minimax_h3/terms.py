"""Memory that the phases of a job with MiniMax-H3 share: states, pictures, latents, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from penstock.engine.families.minimax_h3.cost import PackedCase
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.text.patches import tokens
from penstock.engine.request.generation import GenerationRequest
from penstock.profiles.caching import OFF, STATE_TENSORS
from penstock.profiles.phases import Case

if TYPE_CHECKING:
    from penstock.engine.families.minimax_h3.manifest import H3Manifest

_SINGLE = 4  # bytes of an fp32

TEXT_TOKENS = 512
"""Of a prompt, which is not padded: what a plan has room for."""

H3Case: TypeAlias = "Case[H3Manifest]"


def anchors(request: GenerationRequest) -> tuple[str, ...]:
    """Return where the given pictures stand, in order."""
    given = (("first", request.image), ("last", request.last_image))
    return tuple(name for name, path in given if path is not None)


def latents_of(case: H3Case) -> Latents:
    """Return the sizes of what is denoised."""
    spec = case.manifest.transformer
    return Latents.of(case.workload.shape, spec.in_channels, spec.audio_in_channels)


def pictures_of(case: H3Case) -> int:
    """Return the pictures that are given."""
    return case.workload.pictures or 0


def picture_tokens(case: H3Case) -> int:
    """Count the tokens of the given pictures in the prompt, their labels among them: they are shown
    at the size of the video."""
    shape = case.workload.shape
    return pictures_of(case) * tokens(shape.height, shape.width)


def text_rows(case: H3Case) -> int:
    """Count the rows of the prompt as it is planned for, with its pictures."""
    return TEXT_TOKENS + picture_tokens(case)


def evaluations(case: H3Case) -> int:
    """Return the forward passes of a job: the makers count the levels of noise, of which the last
    is none."""
    return case.workload.steps - 1


def packed_case(case: H3Case, chunk_rows: int = 1) -> PackedCase:
    """Return what the transformer's bytes depend on."""
    return PackedCase(
        latents_of(case),
        text_rows(case),
        pictures_of(case),
        chunk_rows,
        case.fused_norms,
        STATE_TENSORS if case.policy.caching.kind != OFF else 0,
        case.policy.attending.kind,
    )


def state_bytes(case: H3Case) -> int:
    """Return what the text encoder leaves: states, and a tag a row."""
    spec = case.manifest.transformer
    return text_rows(case) * (spec.text_dim * spec.weights.itemsize + 8)


def condition_bytes(case: H3Case) -> int:
    """Return the latents of the given pictures, fp32."""
    sizes = latents_of(case)
    return pictures_of(case) * sizes.channels * sizes.height * sizes.width * _SINGLE


def latents_bytes(case: H3Case) -> int:
    """Return the latents of the video and its sound, fp32."""
    return latents_of(case).elements * _SINGLE


def saved_state_bytes(case: H3Case) -> int:
    """Return a copy of where the sampling stands, which is written while the next step computes."""
    return (1 + packed_case(case).cached) * latents_bytes(case)


def restored_bytes(case: H3Case) -> int:
    """Return the most that reading a kept job takes: two generations of where it stands and the
    file of one; or the states and the pictures' latents, and their file."""
    return max(3 * saved_state_bytes(case), 2 * (state_bytes(case) + condition_bytes(case)))


def places_bytes(case: H3Case) -> int:
    """Return every row's place in time and in the picture, fp64, and its angles in fp32 on their
    way to the device: places and turns; turns twice over; cosines, and those as they are kept."""
    rows, axes = packed_case(case).rows, 3
    turned = axes * case.manifest.transformer.rope_freq_dim
    return rows * (axes * (8 + _SINGLE) + _SINGLE * (turned + 2 * turned + 2 * 2 * turned))


def tables_bytes(case: H3Case) -> int:
    """Return the AdaLN tables of all steps, in host memory."""
    one = case.manifest.transformer.table_bytes(packed_case(case).timesteps)
    return evaluations(case) * one


def sound_bytes(case: H3Case) -> int:
    """Return the waveform, fp32, both channels."""
    audio = case.manifest.audio
    return 2 * latents_of(case).sound * audio.hop * _SINGLE
