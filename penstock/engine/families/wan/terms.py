"""Host memory that the phases of a job with Wan share: states, pictures, latents, in bytes."""

from __future__ import annotations

from typing import TypeAlias

from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS, UNIPC_HISTORY
from penstock.engine.families.wan.spec import WanSpec
from penstock.profiles.phases import Case
from penstock.profiles.tiling import TileGrid

_SINGLE = 4  # bytes of an fp32

WanCase: TypeAlias = Case[WanSpec]


def latent_of(case: WanCase) -> tuple[int, int, int]:
    """Latent frames, height and width."""
    return case.workload.shape.latent(case.manifest.vae)


def latent_volume(case: WanCase) -> int:
    """Elements of one latent channel."""
    frames, height, width = latent_of(case)
    return frames * height * width


def encoder_state_bytes(case: WanCase) -> int:
    """What the encoders leave for the transformer, in host memory."""
    manifest = case.manifest
    text = case.workload.branches * TEXT_TOKENS * manifest.text.d_model
    bytes_ = text * manifest.text.weights.itemsize
    if manifest.image is not None:
        image = manifest.image
        bytes_ += image.tokens * image.hidden_size * image.weights.itemsize
    return bytes_


def picture_bytes(case: WanCase) -> int:
    """The conditioning picture at the video's size: as bytes, and in fp32."""
    return 3 * case.workload.shape.width * case.workload.shape.height * (1 + _SINGLE)


def condition_bytes(case: WanCase) -> int:
    """Mask and latents of the picture, in fp32."""
    spec = case.manifest.transformer
    return (spec.in_channels - spec.out_channels) * latent_volume(case) * _SINGLE


def latents_bytes(case: WanCase) -> int:
    """The latents, in fp32."""
    return case.manifest.vae.z_dim * latent_volume(case) * _SINGLE


def saved_state_bytes(case: WanCase) -> int:
    """A copy of the sampler's state, which is written while the next step computes: the latents
    and UniPC's history, the longest of the solvers."""
    return (1 + UNIPC_HISTORY) * latents_bytes(case)


def restored_bytes(case: WanCase) -> int:
    """The most that reading a kept job takes: two generations of the sampler's state and the file
    of one; or the encoded prompt and picture, and their file."""
    conditions = encoder_state_bytes(case) + condition_bytes(case)
    return max(3 * saved_state_bytes(case), 2 * conditions)


def tile_bytes(case: WanCase, grid: TileGrid) -> int:
    """The pixels of the largest tile of the video."""
    _, height, width = latent_of(case)
    rows, columns = -(-height // grid.rows), -(-width // grid.cols)
    factor = case.manifest.vae.spatial_factor
    return 3 * case.workload.shape.frames * rows * columns * factor**2
