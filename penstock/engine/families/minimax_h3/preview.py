"""Previews of a running job: a map from latents to colours that is fitted to its VAE, and a picture
every N steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.layout import unpack
from penstock.engine.families.minimax_h3.model import model_of
from penstock.engine.families.minimax_h3.sampling import PairedSampler
from penstock.engine.families.minimax_h3.sizes import SPATIAL_FACTOR, Latents
from penstock.engine.families.minimax_h3.video_vae import vit
from penstock.engine.families.minimax_h3.video_vae.decode import denormalised
from penstock.engine.families.minimax_h3.video_vae.kind import DECODER
from penstock.engine.families.minimax_h3.video_vae.tiles import Tiling
from penstock.engine.model.component import Component
from penstock.engine.run.preview import FIT_FRAMES, Preview, fit_map
from penstock.engine.run.stage import Stage
from penstock.offload.streamer import BlockStream
from penstock.profiles.manifest import SCRATCH

_CLIP = 7
"""Latent frames of the shortest video that the VAE decodes: a still, for as long."""


def prepare_previews(stage: Stage) -> None:
    """Fit the map: what is decoded for it is one tile of one clip, so that it takes no more than
    the phase "decode" does."""
    request = stage.job.request
    size = request.height // SPATIAL_FACTOR, request.width // SPATIAL_FACTOR
    channels = model_of(stage).manifest.transformer.in_channels
    with _stills(stage) as decode:
        rgb_map = fit_map(decode, channels, size, stage.monitor.check)
    stage.monitor.notice(f"previews: colours are {rgb_map.note}")
    stage.job.previewer.use(rgb_map)


@contextmanager
def _stills(stage: Stage) -> Iterator[Callable[[Tensor], Tensor]]:
    """Decode normalised latents (1, z, 1, h, w) to pixels, uint8 (1, H, W, 3)."""
    component, plan = stage.model.parts[DECODER], stage.plan["decode"]
    assert plan.stream is not None
    scratch = dict(plan.work).get(SCRATCH, 0)
    with (
        stage.device_ledger.reserve("preview: fit", plan.work_bytes),
        stage.model.scratch.held(scratch),
        stage.rest(component) as vae,
        stage.blocks(component.blocks, plan.stream, FIT_FRAMES) as stream,
    ):

        def decode(latents: Tensor) -> Tensor:
            still = latents.expand(-1, -1, _CLIP, -1, -1)
            tiling = Tiling.of(component.config, (_CLIP, *latents.shape[-2:]))
            waves = vit.rope(tiling, component.config, component.dtype, stage.device)
            given = denormalised(still, component.config).to(stage.device)
            ((tile,),) = vit.groups(tiling, 1)
            hidden = [vit.enter(vae, vit.cut(given, tiling, tile))]
            vit.through(_layers(stream, component), hidden, waves)
            video = torch.empty(
                (tiling.clips.frames, tiling.rows.size, tiling.columns.size, 3), dtype=torch.uint8
            )
            vit.Canvas(tiling, video).lay(tile, vit.leave(vae, hidden[0], tiling).cpu())
            middle = len(video) // 2
            return video[middle : middle + 1]

        yield decode


def _layers(stream: BlockStream, component: Component) -> Iterator[tuple[int, Any]]:
    """Yield one pass over all blocks: as `penstock.engine.run.stage.visits`, of no phase."""
    for index, tensors in stream.forward_pass():
        with component.bound(tensors, index) as block:
            yield index, block


def preview_of(
    stage: Stage, sampler: PairedSampler, prediction: Tensor, latents: Tensor, sizes: Latents
) -> Preview | None:
    """Return the preview of the step that ``sampler`` is about to take, where one is due."""
    every, step = stage.job.hooks.preview_every, sampler.next_step
    if every is None or (step + 1) % every:
        return None
    video, _ = unpack(latents, sizes)
    towards, _ = unpack(prediction, sizes)
    return stage.job.previewer.make(video, towards, sampler.sigma(step))
