"""The pictures that a video starts from and ends with, as the makers fit and see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.engine.families.minimax_h3.text.patches import PROCESSOR, seen_size
from penstock.engine.media.picture import open_image

if TYPE_CHECKING:
    from penstock.engine.run.stage import Stage


def keyframes(stage: Stage) -> list[Tensor]:
    """Return the request's pictures at the video's size, uint8 (h, w, 3) each, on the CPU: the
    first that is given is stretched, another is scaled to cover the frame and cut around its
    middle."""
    request = stage.job.request
    size = request.width, request.height
    return [
        fitted(open_image(path), *size, covers=number > 0)
        for number, path in enumerate(request.pictures)
    ]


def fitted(picture: Image.Image, width: int, height: int, *, covers: bool) -> Tensor:
    """Return ``picture`` as a frame of the video, uint8 (height, width, 3).

    As the modular pipeline of diffusers has it, which follows the makers' rounding: the scaled size
    is rounded, and the cut begins at half of what is over.

    Args:
        covers: keep its aspect and cut what is over; else all of it is stretched.
    """
    lanczos = Image.Resampling.LANCZOS
    if picture.size != (width, height) and not covers:
        picture = picture.resize((width, height), lanczos)
    elif picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        wide, high = (
            max(a, round(b * scale)) for a, b in zip((width, height), picture.size, strict=True)
        )
        left, top = (wide - width) // 2, (high - height) // 2
        picture = picture.resize((wide, high), lanczos)
        picture = picture.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(picture))


def patches(
    frame: Tensor, processor: Mapping[str, Any] = PROCESSOR
) -> tuple[Tensor, tuple[int, int]]:
    """Return a picture as Qwen3-VL's vision tower takes it: patches (n, values) fp32, those that
    become one token together, and how many there are down and across.

    As transformers' processor makes them without torchvision.

    Args:
        frame: uint8 (h, w, 3).
        processor: its config, as far as one is known.
    """
    config = {**PROCESSOR, **processor}
    high, wide = seen_size(frame.shape[0], frame.shape[1], config)
    pixels = frame.numpy()
    if pixels.shape[:2] != (high, wide):
        resample = Image.Resampling(config["resample"])
        pixels = np.array(Image.fromarray(pixels).resize((wide, high), resample=resample))
    # In fp64, then rounded once; then normed in fp32
    unit = (pixels.astype(np.float64) * config["rescale_factor"]).astype(np.float32)
    mean, deviation = (np.array(config[f"image_{each}"], np.float32) for each in ("mean", "std"))
    side, merge = config["patch_size"], config["merge_size"]
    down, across = high // side, wide // side
    # (h, w, 3) -> (down, across, merge, merge, 3, side, side)
    tiles = torch.from_numpy((unit - mean) / deviation).view(
        down // merge, merge, side, across // merge, merge, side, 3
    )
    tiles = tiles.permute(0, 3, 1, 4, 6, 2, 5)
    # A still picture fills the patch's frames
    frames = tiles.unsqueeze(5).expand(*tiles.shape[:5], config["temporal_patch_size"], side, side)
    return frames.reshape(down * across, -1), (down, across)
