"""The phase "encode": pictures to the latents that stand still while the video is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.video_vae.kind import ENCODER
from penstock.engine.families.minimax_h3.video_vae.tiles import Axis
from penstock.engine.families.minimax_h3.video_vae.vit import PIXEL_MEAN, PIXEL_STD, Mosaic

if TYPE_CHECKING:
    from penstock.engine.run.stage import Stage

SEED = 42
"""Of the posterior's draw, whatever the request's is: a picture always gives the same latents."""


def encode(stage: Stage, frames: Sequence[Tensor]) -> Tensor:
    """Return the latents (k, z, 1, h, w) of ``frames``, uint8 (H, W, 3) each, fp32, normalised, on
    the CPU."""
    component = stage.model.parts[ENCODER]
    units = sum(axes[0].count * axes[1].count for axes in map(axes_of, frames))
    with stage.phase("encode", units, "tile") as (_, phase), stage.rest(component) as vae:
        return torch.cat([
            encode_picture(vae, frame.to(stage.device), phase.advance) for frame in frames
        ])  # fmt: skip


def axes_of(frame: Tensor, factor: int = 16) -> tuple[Axis, Axis]:
    """Return the tiles of a picture (H, W, 3)."""
    return Axis.over(frame.shape[0], factor), Axis.over(frame.shape[1], factor)


def encode_picture(
    vae: Any, frame: Tensor, should_stop: Callable[[], object] = lambda: None
) -> Tensor:
    """Return the latents (1, z, 1, h, w) of a picture, on the CPU.

    As diffusers' modular pipeline makes them: ImageNet's norm, the makers' tiles, a draw from the
    posterior, rounded to fp16, then normalised.

    Args:
        frame: uint8 (H, W, 3), where the VAE is.
        should_stop: called after each tile; ends the work by raising.
    """
    moments = encode_tiles(vae, normed(frame), should_stop)
    mean, spread = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * spread.clamp(-30.0, 20.0))
    drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(SEED))
    latents = (mean + deviation * drawn.to(mean.device)).half().float().cpu()
    view = (1, -1, 1, 1, 1)
    centre, scale = (
        torch.tensor(vae.config[f"latents_{name}"]).view(view) for name in ("mean", "std")
    )
    return (latents - centre) / scale


def normed(frame: Tensor) -> Tensor:
    """Return a picture (H, W, 3) in bytes as (1, 3, 1, H, W) fp32, normed as ImageNet's."""
    unit = frame.permute(2, 0, 1)[None, :, None].to(torch.float32).div_(255.0)
    mean, deviation = (
        torch.tensor(each, device=frame.device).view(1, 3, 1, 1, 1)
        for each in (PIXEL_MEAN, PIXEL_STD)
    )
    return unit.sub_(mean).div_(deviation)


def encode_tiles(
    vae: Any, pixels: Tensor, should_stop: Callable[[], object] = lambda: None
) -> Tensor:
    """Return the moments (1, 2z, 1, h, w) of a picture (1, 3, 1, H, W), its tiles blended."""
    factor = 1
    for each in vae.config.spatial_downsample_factors:
        factor *= each
    rows, columns = (Axis.over(size, factor) for size in pixels.shape[-2:])
    mosaic = Mosaic(rows.shrunk(factor), columns.shrunk(factor))
    whole = None
    for row, top in enumerate(rows.starts):
        for column, left in enumerate(columns.starts):
            part = pixels[..., top : top + rows.length, left : left + columns.length]
            whole = mosaic.lay(row, column, vae.quant_conv(vae.encoder(part)))
            should_stop()
    assert whole is not None
    return whole
