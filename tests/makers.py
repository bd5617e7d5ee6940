"""The makers' noise levels by their formula, put into diffusers' schedulers: what a job is compared
with, since diffusers' own levels are others and change from version to version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from penstock.engine.request.generation import GenerationRequest


def makers_levels(first: float, steps: int, shift: float) -> Any:
    """``(steps,)`` in float64: evenly down from ``first`` to nothing, then shifted.

    Args:
        first: 0.999 for UniPC, 1 for DPM++.
        steps: of the job.
        shift: of the flow.
    """
    even = np.linspace(np.float32(first).item(), 0, steps + 1)[:-1]
    return shift * even / (1 + (shift - 1) * even)


def at_makers_levels(scheduler: Any, steps: int, shift: float) -> Any:
    """``scheduler``, UniPC's or DPM++'s, standing at the makers' levels."""
    first = 0.999 if isinstance(scheduler, UniPCMultistepScheduler) else 1.0
    levels = makers_levels(first, steps, shift)
    scheduler.sigmas = torch.from_numpy(np.append(levels, 0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy((levels * 1000).astype(np.int64))
    return scheduler


class _MakersUniPC(UniPCMultistepScheduler):
    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        at_makers_levels(self, num_inference_steps, self.config.flow_shift)


def makers_unipc(config: Mapping[str, Any], shift: float) -> Any:
    """UniPC of a folder's config for a diffusers pipeline, with the makers' levels."""
    return _MakersUniPC.from_config(config, flow_shift=shift)


def made_by_diffusers(
    folder: Path, request: GenerationRequest, shift: float, last: Path | None = None, **more: Any
) -> dict[str, Any]:
    """A job's "latent" and frames ("np") by diffusers' own pipeline at the makers' levels.

    Args:
        last: the picture that the video ends with.
        more: further arguments of the pipeline, or others than the request's.
    """
    made = WanPipeline if request.image is None else WanImageToVideoPipeline
    pipe = made.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = makers_unipc(pipe.scheduler.config, shift)
    paths = {"image": request.image, "last_image": last}
    asked = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    } | {name: Image.open(path).convert("RGB") for name, path in paths.items() if path is not None}
    return {
        kind: pipe(
            **(asked | more),
            generator=torch.Generator().manual_seed(request.seed or 0),
            output_type=kind,
        ).frames
        for kind in ("latent", "np")
    }
