"""A video that goes on from another: its last frame, its settings, and the colours at the seam.

A picture that goes through the VAE and the transformer comes back with its colours a little off,
and clip after clip that adds up. The first frame of what is made shows what the last frame before
it shows, but it is decoded alone, with nothing before it, and its colours are off by themselves: of
the small model's by 1 to 6 levels of 255, where those of the next frames are off by 0 to 3. So the
second is compared: what turns its colours into those of the last frame before holds for what
follows, and takes away no more than one frame's change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.engine.media.video import frame_rate_of, read_frames, read_metadata
from penstock.errors import VideoError

Pixels = NDArray[np.uint8]

MOST_GAIN = 1.25
"""By which the spread of a channel may change: more is no shift of colours but another picture."""


@dataclass(frozen=True)
class Clip:
    """A finished video that shall go on.

    Attributes:
        path: the file.
        last: its last frame (h, w, 3).
        frames: how many it has.
        fps: frames a second.
        settings: what it was made with, as far as it says so.
    """

    path: Path
    last: Pixels
    frames: int
    fps: float
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Clip:
        """Decode ``path`` to its end.

        Raises:
            VideoError: it cannot be read as a video, or has no frames.
        """
        settings, last, count = read_metadata(path), None, 0
        for last in read_frames(path):  # noqa: B007 (the last one is wanted)
            count += 1
        if last is None:
            raise VideoError("the video to continue has no frames", found=str(path))
        return cls(path, last, count, float(frame_rate_of(path)), settings)

    @property
    def size(self) -> str:
        """Of its frames, such as "832x480"."""
        height, width = self.last.shape[:2]
        return f"{width}x{height}"


@dataclass(frozen=True)
class Colours:
    """What turns one picture's colours into another's: ``pixel * gain + offset``, (3,) each."""

    gain: NDArray[np.float32]
    offset: NDArray[np.float32]

    @classmethod
    def between(cls, made: Pixels, wanted: Pixels) -> Colours:
        """Make it from a frame that was made to the one whose colours it should have: each
        channel's mean and spread become those of the other.

        Source: Reinhard et al., "Color Transfer between Images", IEEE CG&A 2001, in RGB.
        """
        ours, theirs = (_moments(frame) for frame in (made, wanted))
        gain = np.clip(theirs[1] / np.maximum(ours[1], 1), 1 / MOST_GAIN, MOST_GAIN).astype(
            np.float32
        )
        return cls(gain, (theirs[0] - gain * ours[0]).astype(np.float32))

    def __call__(self, frame: Pixels) -> Pixels:
        """Map (h, w, 3) to the same in the other's colours."""
        found: Pixels = np.clip(np.rint(frame * self.gain + self.offset), 0, 255).astype(np.uint8)
        return found


def _moments(frame: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    channels = frame.reshape(-1, 3).astype(np.float32)
    return channels.mean(0), channels.std(0)


def joined(before: Path, made: Iterable[Pixels]) -> Iterator[Pixels]:
    """Yield the frames of ``before``, then those of ``made`` in its colours but for the first,
    which shows its last one again.

    Args:
        before: a video; decoded as it goes.
        made: frames of the same size, the first of which is the last of ``before``.

    Raises:
        VideoError: ``before`` cannot be read, or is of another size.
    """
    frames, last = iter(made), None
    first = next(frames)
    for last in read_frames(before):
        if last.shape != first.shape:
            raise VideoError(
                "the video to continue has frames of another size",
                expected=f"{first.shape[1]}x{first.shape[0]}",
                found=f"{last.shape[1]}x{last.shape[0]}, {before}",
            )
        yield last
    if last is None:
        raise VideoError("the video to continue has no frames", found=str(before))
    second = next(frames, None)
    if second is None:
        return
    turned = Colours.between(second, last)
    for frame in chain([second], frames):
        yield turned(frame)
