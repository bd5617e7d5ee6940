"""Previews of a running job: its VAE's map from latents to colours, and a picture every N steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan.latent_rgb import BIAS, FACTORS, is_published_vae
from penstock.engine.families.wan.model import model_of
from penstock.engine.families.wan.vae_decode import decode_frames, raw_latents
from penstock.engine.run.preview import Preview, RgbMap, fit_map
from penstock.engine.run.sampler import Sampler
from penstock.engine.run.stage import Stage
from penstock.profiles.tiling import TileGrid


def prepare_previews(stage: Stage) -> None:
    """Find the map from latents to colours: the published one, or one fitted to the VAE here."""
    rgb_map = published_map(model_of(stage).vae_decoder.module.config) or _fitted(stage)
    stage.monitor.notice(f"previews: colours are {rgb_map.note}")
    stage.job.previewer.use(rgb_map)


def _fitted(stage: Stage) -> RgbMap:
    """Fit a map to the VAE; what is decoded is no larger than one frame, so that it takes no more
    than the phase "decode" does."""
    component, vae_spec = model_of(stage).vae_decoder, model_of(stage).manifest.vae
    _, height, width = stage.job.request.video_shape.latent(vae_spec)
    need_bytes = stage.plan["decode"].work_bytes
    with stage.device_ledger.reserve("preview: fit", need_bytes), stage.rest(component) as vae:

        def decode(latents: Tensor) -> Tensor:
            there = latents.to(stage.device, component.dtype)
            return decode_frames(vae, raw_latents(there, vae.config), TileGrid(1, 1))

        return fit_map(decode, vae_spec.z_dim, (height, width), stage.monitor.check)


def preview_of(
    stage: Stage, sampler: Sampler, prediction: Tensor, latents: Tensor
) -> Preview | None:
    """Return the preview of the step that ``sampler`` is about to take, where one is due."""
    every, step = stage.job.hooks.preview_every, sampler.next_step
    if every is None or (step + 1) % every:
        return None
    return stage.job.previewer.make(latents, prediction, sampler.sigma(step))


def published_map(config: Mapping[str, Any]) -> RgbMap | None:
    """Return the published map of the Wan2.1 VAE, if ``config`` is that VAE's."""
    if not is_published_vae(config):
        return None
    return RgbMap(torch.tensor(FACTORS), torch.tensor(BIAS), "the published Wan2.1 factors")
