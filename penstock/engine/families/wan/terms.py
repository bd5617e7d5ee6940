"""Host memory that the phases of a job with Wan share: states, pictures, latents, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from penstock.blocks import PAGE_BYTES
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS, UNIPC_HISTORY
from penstock.profiles.caching import OFF, STATE_TENSORS
from penstock.profiles.manifest import Picture
from penstock.profiles.phases import FIRST_FRAME, Case
from penstock.profiles.tiling import TileGrid

if TYPE_CHECKING:
    from penstock.engine.families.wan.manifest import WanManifest

_SINGLE = 4  # bytes of an fp32
_PILLOW_RGB = 4  # bytes of a pixel in Pillow
_SMALL_BYTES = 16
"""Of a pixel of the picture as it is scaled for the image encoder: Pillow's, and the copies that
transformers' processor makes of it."""

_SEEN_BYTES = 3 * (8 + 4 + 4 + 4)
"""Of a pixel that the image encoder sees: scaled in fp64, in fp32, normalised, and as a tensor."""
SQUASHED_ROWS = 16
"""Rows of the picture that are scaled for the image encoder at a time, where it sees all of it."""

_BAND_BYTES = _PILLOW_RGB + 3 * (1 + _SINGLE)
"""Of a pixel of those rows: as Pillow has it, as bytes, in fp32."""


WanCase: TypeAlias = "Case[WanManifest]"


def latent_of(case: WanCase) -> tuple[int, int, int]:
    """Return the latent frames, height and width."""
    return case.workload.shape.latent(case.manifest.vae)


def latent_volume(case: WanCase) -> int:
    """Return the elements of one latent channel."""
    frames, height, width = latent_of(case)
    return frames * height * width


def encoder_state_bytes(case: WanCase) -> int:
    """Return what the encoders leave for the transformer, in host memory."""
    manifest = case.manifest
    text = case.workload.texts * TEXT_TOKENS * manifest.text.d_model
    bytes_ = text * manifest.text.weights.itemsize
    if manifest.image is not None:
        image = manifest.image
        bytes_ += manifest.image_tokens * image.hidden_size * image.weights.itemsize
    return bytes_


def pictures_of(case: WanCase) -> int:
    """Return the pictures that the video starts from and ends with."""
    wanted = case.manifest.pictures
    needed = (wanted.first == "must") + (wanted.last == "must")
    return max(case.workload.pictures or 0, needed)


def changes_of(case: WanCase) -> tuple[int, ...] | None:
    """As `penstock.profiles.phases.Workload.changes`, the last frame among them where it is
    given."""
    changes = case.workload.changes
    return (
        changes if changes is None else clip_changes(case.workload.shape.frames, pictures_of(case))
    )


def clip_changes(frames: int, pictures: int) -> tuple[int, ...]:
    """Return the frames of a conditioning clip that differ from the one before."""
    return (*FIRST_FRAME, frames - 1) if pictures == 2 else FIRST_FRAME


def picture_bytes(case: WanCase) -> int:
    """Return the conditioning pictures at the video's size: as bytes, and in fp32."""
    return max(1, pictures_of(case)) * _frame_bytes(case)


def _frame_bytes(case: WanCase) -> int:
    return 3 * case.workload.shape.width * case.workload.shape.height * (1 + _SINGLE)


def decoding_bytes(case: WanCase) -> int:
    """Return what decoding the pictures, one after the other, and scaling them down takes at its
    peak, its results included: what the image encoder sees, and fp32 at the video's size."""
    work, side = case.workload, 0 if case.manifest.image is None else case.manifest.image.image_size
    first = _one_decoding_bytes(case, work.picture)
    if pictures_of(case) < 2:
        return first
    kept = _frame_bytes(case) + _SEEN_BYTES * side * side
    return max(first, kept + _one_decoding_bytes(case, work.last))


def _one_decoding_bytes(case: WanCase, picture: Picture | None) -> int:
    shape = case.workload.shape
    if picture is None:
        return _frame_bytes(case)
    decoded = _PILLOW_RGB * picture.width * picture.height
    side = 0 if case.manifest.image is None else case.manifest.image.image_size
    seen = _SEEN_BYTES * side * side
    # At most twice that side, the longer one in proportion
    long = 2 * side * max(picture.width, picture.height) // min(picture.width, picture.height) + 1
    columns = 2 * side if picture.height > picture.width else long
    # Pillow scales along the rows first, then along the columns
    to_crop = _PILLOW_RGB * columns * picture.height + _SMALL_BYTES * 2 * side * long
    band = SQUASHED_ROWS * (_BAND_BYTES * picture.width + 3 * _SINGLE * side)
    to_squash = 3 * _SINGLE * side * picture.height + band
    to_frame = _PILLOW_RGB * shape.width * (picture.height + shape.height)
    return max(
        picture.decode_bytes,
        decoded + max(to_crop, to_squash) + seen,
        decoded + seen + to_frame,
        decoded + seen + _frame_bytes(case),
    )


def condition_bytes(case: WanCase) -> int:
    """Return the mask and latents of the picture, in fp32."""
    spec = case.manifest.transformer
    if case.manifest.tokenwise:
        _, height, width = latent_of(case)
        return pictures_of(case) * spec.out_channels * height * width * _SINGLE
    return (spec.in_channels - spec.out_channels) * latent_volume(case) * _SINGLE


def latents_bytes(case: WanCase) -> int:
    """Return the latents, in fp32."""
    return case.manifest.vae.z_dim * latent_volume(case) * _SINGLE


def cached_tensors(case: WanCase) -> int:
    """Count the tensors of the latents' size that a step cache keeps between steps."""
    return STATE_TENSORS if case.policy.caching.kind != OFF else 0


def saved_state_bytes(case: WanCase) -> int:
    """Return a copy of the sampler's state, which is written while the next step computes: the
    latents and UniPC's history, the longest of the solvers; and what a step cache keeps."""
    return (1 + UNIPC_HISTORY + cached_tensors(case)) * latents_bytes(case)


def restored_bytes(case: WanCase) -> int:
    """Return the most that reading a kept job takes: two generations of the sampler's state and the
    file of one; or the encoded prompt and picture, and their file."""
    conditions = encoder_state_bytes(case) + condition_bytes(case)
    return max(3 * saved_state_bytes(case), 2 * conditions)


LANDING_BUFFERS = 2
"""Of pinned memory, for decoded pieces on their way to RAM: one fills while the other is read."""


def landing_bytes(piece_bytes: int) -> int:
    """Return those buffers, for pieces of so many bytes at most."""
    return LANDING_BUFFERS * -(-piece_bytes // PAGE_BYTES) * PAGE_BYTES


def tile_bytes(case: WanCase, grid: TileGrid) -> int:
    """Return the pixels of the largest tile of the video."""
    _, height, width = latent_of(case)
    rows, columns = -(-height // grid.rows), -(-width // grid.cols)
    factor = case.manifest.vae.spatial_factor
    return 3 * case.workload.shape.frames * rows * columns * factor**2
