"""Pictures and frames between ComfyUI's process and the worker's: by files, in its temp folder."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_WHITE = 255


def picture_file(image: Tensor, folder: Path) -> Path:
    """Return the first picture of an IMAGE as a PNG, named by what it shows.

    Args:
        image: (n, height, width, channels) in 0..1.
        folder: where it goes.
    """
    from PIL import Image

    pixels = (image[0, ..., :3].clamp(0, 1) * _WHITE).round().to("cpu").numpy().astype(np.uint8)
    path = folder / f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:24]}.png"
    if not path.exists():
        Image.fromarray(pixels).save(path, "PNG")
    return path


def mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """Return the frames in a file as an IMAGE, whose memory is the file's: pages come as they are
    read, and what is written to them stays in this process.

    Args:
        path: as `penstock.comfy.desk.hand_over` wrote it.
        shape: (frames, height, width, 3).
    """
    import torch

    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pixels: Any = np.frombuffer(view, np.float32).reshape(tuple(shape))
    return torch.from_numpy(pixels)


def drop(path: Path) -> None:
    """Give a file's name away; its memory stays while a tensor lies in it."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows, while it is mapped: ComfyUI empties the folder
        return
