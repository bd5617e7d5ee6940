"""The sizes of video that a model can represent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """What a model can represent. The defaults are Wan2.1's. A job's record has all of it.

    Attributes:
        side: pixels that both sides must be multiples of (VAE factor 8 x patch 2).
        temporal: video frames a latent frame: frames must be ``temporal * n + rest``.
        positions: rotary positions on each axis (``rope_max_seq_len``), in patches.
        rest: frames beside the multiple.
        fewest, most: frames; 0: as ``rest`` and ``positions`` have it.
        coherent: frames beyond which a video made at once degenerates.
        ends_alone: whether a video may end with a picture without starting from one.
    """

    side: int = 16
    temporal: int = 4
    positions: int = 1024
    rest: int = 1
    fewest: int = 0
    most: int = 0
    coherent: int = 121
    ends_alone: bool = False

    @property
    def max_side(self) -> int:
        """The longest side in pixels."""
        return self.side * self.positions

    @property
    def min_frames(self) -> int:
        """The smallest number of frames."""
        return self.fewest or self.rest

    @property
    def max_frames(self) -> int:
        """The largest number of frames."""
        return self.most or self.temporal * (self.positions - 1) + self.rest

    @property
    def frames_told(self) -> str:
        """The legal numbers of frames, for people."""
        return f"{self.temporal}n+{self.rest} from {self.min_frames} to {self.max_frames}"

    def nearest_side(self, pixels: int) -> int:
        """Return the legal side nearest to ``pixels``; the smaller of two equally near ones."""
        return _nearest(pixels, self.side, self.side, self.max_side)

    def nearest_frames(self, frames: int) -> int:
        """Return the legal frame count nearest to ``frames``; the smaller of two equally near
        ones."""
        low, high = self.min_frames - self.rest, self.max_frames - self.rest
        return self.rest + _nearest(frames - self.rest, self.temporal, low, high)


def _nearest(value: int, step: int, low: int, high: int) -> int:
    return min(max(-((step // 2 - value) // step) * step, low), high)
