"""The phase "decode": latents to frames, by the makers' tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.video_vae import vit
from penstock.engine.families.minimax_h3.video_vae.kind import DECODER
from penstock.engine.families.minimax_h3.video_vae.tiles import Tiling
from penstock.engine.run.stage import visits

if TYPE_CHECKING:
    from penstock.engine.run.events import PhaseMonitor
    from penstock.engine.run.stage import Stage


def decode(stage: Stage, latents: Tensor) -> Tensor:
    """Return the frames, uint8 (t, H, W, 3) on the CPU, of normalised latents (1, z, t, h, w)
    fp32."""
    component = stage.model.parts[DECODER]
    latent = latents.shape[2], latents.shape[3], latents.shape[4]
    tiling = Tiling.of(component.config, latent)
    size = tiling.clips.frames, tiling.rows.size, tiling.columns.size
    parts = list(vit.groups(tiling, stage.plan["decode"].tiles[1]))
    units = len(parts) * len(component.blocks)
    with (
        stage.phase("decode", units, "layer") as (plan, phase),
        stage.rest(component) as vae,
        stage.stream(component.blocks, plan.stream, phase, len(parts)) as stream,
    ):
        video = torch.empty((*size, 3), dtype=torch.uint8)
        canvas = vit.Canvas(tiling, video)
        given = denormalised(latents, component.config).to(stage.device)
        waves = vit.rope(tiling, component.config, component.dtype, stage.device)
        for group in parts:
            hidden = [vit.enter(vae, vit.cut(given, tiling, tile)) for tile in group]
            layers = visits(stream, component, phase)
            vit.through(_counted(layers, phase), hidden, waves)
            for tile in group:
                canvas.lay(tile, vit.leave(vae, hidden.pop(0), tiling).cpu())
        return video


def denormalised(latents: Tensor, config: Any) -> Tensor:
    """Return the latents as the VAE has them."""
    mean, deviation = (
        torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    return latents * deviation + mean


def _counted(blocks: Iterator[tuple[int, Any]], phase: PhaseMonitor) -> Iterator[tuple[int, Any]]:
    for index, block in blocks:
        yield index, block
        phase.advance()
