"""Previews of a running job: its VAE's map from latents to colours, and a picture every N steps."""

from __future__ import annotations

from torch import Tensor

from penstock.engine.families.minimax_h3.layout import unpack
from penstock.engine.families.minimax_h3.model import model_of
from penstock.engine.families.minimax_h3.sampling import PairedSampler
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.video_vae.decode import sample
from penstock.engine.run.preview import Preview, fit_map
from penstock.engine.run.stage import Stage


def prepare_previews(stage: Stage) -> None:
    """Fit a map from latents to colours to the VAE, on pictures of a few latents that it decodes."""
    spec = model_of(stage).manifest.transformer
    request = stage.job.request
    size = request.height // 16, request.width // 16
    with sample(stage) as decode:
        rgb_map = fit_map(decode, spec.in_channels, size, stage.monitor.check)
    stage.monitor.notice(f"previews: colours are {rgb_map.note}")
    stage.job.previewer.use(rgb_map)


def preview_of(
    stage: Stage, sampler: PairedSampler, prediction: Tensor, latents: Tensor, sizes: Latents
) -> Preview | None:
    """The preview of the step that ``sampler`` is about to take, where one is due."""
    every, step = stage.job.hooks.preview_every, sampler.next_step
    if every is None or (step + 1) % every:
        return None
    video, _ = unpack(latents, sizes)
    towards, _ = unpack(prediction, sizes)
    return stage.job.previewer.make(video, towards, sampler.sigma(step))
