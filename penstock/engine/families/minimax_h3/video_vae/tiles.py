"""The tiles of MiniMax-H3's video VAE. They are the makers' own, and part of the model: they
overlap and are blended, in space and in time, and another grid gives another picture.

Pure geometry, free of torch: plan and engine read the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import UsageError

SIDE, OVERLAP = 256, 64
"""Pixels of a tile, and the least that two have in common."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of a frame, in pixels.

    Attributes:
        starts: where each begins.
        length: of each.
        overlaps: that each has in common with the one before; one fewer than there are tiles.
    """

    starts: tuple[int, ...]
    length: int
    overlaps: tuple[int, ...]

    @classmethod
    def over(cls, size: int, unit: int) -> Axis:
        """Over ``size`` pixels: the fewest tiles that overlap enough; what is over goes to the
        overlaps in turn, ``unit`` pixels at a time."""
        if size <= SIDE:
            return cls((0,), size, ())
        count = math.ceil((size - OVERLAP) / (SIDE - OVERLAP))
        spare = SIDE * count - OVERLAP * (count - 1) - size
        each, more = divmod(spare // unit, count - 1)
        overlaps = tuple(OVERLAP + unit * (each + (at < more)) for at in range(count - 1))
        starts = [0]
        for overlap in overlaps:
            starts.append(starts[-1] + SIDE - overlap)
        return cls(tuple(starts), SIDE, overlaps)

    @property
    def count(self) -> int:
        """Of tiles."""
        return len(self.starts)

    @property
    def size(self) -> int:
        """Of all of it."""
        return self.starts[-1] + self.length

    def shrunk(self, factor: int) -> Axis:
        """Return the same tiles where ``factor`` pixels are one."""
        starts = tuple(each // factor for each in self.starts)
        return Axis(starts, self.length // factor, tuple(each // factor for each in self.overlaps))

    def before(self, index: int) -> int:
        """Return the pixels in common with the tile before; 0: it is the first."""
        return self.overlaps[index - 1] if index else 0

    def kept(self, index: int) -> int:
        """Return the pixels of a tile that are no other's, counted from its begin."""
        return self.length - (self.overlaps[index] if index < len(self.overlaps) else 0)


@dataclass(frozen=True)
class Clips:
    """How a video is cut along time.

    Attributes:
        factor: frames a latent frame.
        step: latent frames from the begin of a clip to that of the next.
        length: latent frames of a clip.
        skipped: frames at the begin of each half of a decoded clip that were never in the video.
        count: of clips.
    """

    factor: int
    step: int
    length: int
    skipped: int
    count: int

    @classmethod
    def of(cls, config: Mapping[str, Any], latent_frames: int) -> Clips:
        """Make it of a video of ``latent_frames``.

        Raises:
            UsageError: they are no whole number of clips.
        """
        factor = math.prod(config["temporal_downsample_factors"])
        step, drop = math.ceil(config["clip_length"] / factor), config["token_drop"]
        if (latent_frames + drop) % step or latent_frames + drop < 2 * step:
            raise UsageError(
                "the latents are no whole number of clips",
                expected=f"{step} n + {step - drop} latent frames",
                found=str(latent_frames),
            )
        count = (latent_frames + drop) // step - 1
        return cls(factor, step, 2 * step - drop, -config["clip_length"] % factor, count)

    @property
    def first(self) -> int:
        """Frames that a clip brings, the first of which are blended with the clip before."""
        return self.step * self.factor - self.skipped

    @property
    def tail(self) -> int:
        """Frames at a clip's end that the next one begins with again."""
        return (self.length - self.step) * self.factor - self.skipped

    @property
    def frames(self) -> int:
        """Of the video."""
        return self.count * self.first + self.tail


@dataclass(frozen=True)
class Tile:
    """One tile of one clip, in the order in which they are decoded."""

    clip: int
    row: int
    column: int


@dataclass(frozen=True)
class Tiling:
    """All tiles of a video."""

    rows: Axis
    columns: Axis
    clips: Clips
    factor: int

    @classmethod
    def of(cls, config: Mapping[str, Any], latent: tuple[int, int, int]) -> Tiling:
        """Make it of a video with so many latent frames, rows and columns.

        Raises:
            UsageError: as `Clips.of`.
        """
        factor = math.prod(config["spatial_downsample_factors"])
        rows, columns = (Axis.over(factor * size, factor) for size in latent[1:])
        return cls(rows, columns, Clips.of(config, latent[0]), factor)

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles, clip by clip and row by row."""
        for clip in range(self.clips.count):
            for row in range(self.rows.count):
                for column in range(self.columns.count):
                    yield Tile(clip, row, column)

    @property
    def count(self) -> int:
        """Of tiles."""
        return self.clips.count * self.rows.count * self.columns.count

    @property
    def tokens(self) -> int:
        """Latents of a tile."""
        return self.clips.length * (self.rows.length // self.factor) * (
            self.columns.length // self.factor
        )  # fmt: skip
