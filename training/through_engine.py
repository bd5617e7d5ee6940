"""Clips for the score from penstock itself: pictures and prompts through `Engine.submit`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.request.settings import Settings, resolve
from training.generate import Sampler


class EngineGenerator:
    """What `training.generate.Generator` does, one clip a job.

    Args:
        engine: an open image-to-video model of the small size.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, pictures: list[np.ndarray], prompts: list[str], sampler: Sampler, seed: int
    ) -> np.ndarray:
        """Clips (b, frames, h, w, 3) in [0, 1] for pictures (h, w, 3) of one size."""
        clips = []
        with tempfile.TemporaryDirectory() as folder:
            for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
                image = Path(folder) / f"{number}.png"
                Image.fromarray((picture * 255).round().astype(np.uint8)).save(image)
                settings = Settings(prompt=prompt, image=image, seed=seed + number, **vars(sampler))
                job = self._engine.submit(resolve(settings, self._engine.model))
                clips.append(job.result().video.numpy().astype(np.float32) / 255)
        return np.stack(clips)
