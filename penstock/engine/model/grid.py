"""The sizes of video that a model can represent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """What a model can represent. The defaults are Wan2.1's.

    Attributes:
        side: pixels that both sides must be multiples of (VAE factor 8 x patch 2).
        temporal: video frames a latent frame: frames must be ``temporal * n + 1``.
        positions: rotary positions on each axis (``rope_max_seq_len``), in patches.
        coherent: frames beyond which a video made at once degenerates.
        ends_alone: whether a video may end with a picture without starting from one.
    """

    side: int = 16
    temporal: int = 4
    positions: int = 1024
    coherent: int = 121
    ends_alone: bool = False

    @property
    def max_side(self) -> int:
        """The longest side in pixels."""
        return self.side * self.positions

    @property
    def max_frames(self) -> int:
        """The largest number of frames."""
        return self.temporal * (self.positions - 1) + 1

    @property
    def frames_told(self) -> str:
        """The legal numbers of frames, for people."""
        return f"{self.temporal}n+1 from 1 to {self.max_frames}"

    def nearest_side(self, pixels: int) -> int:
        """The legal side nearest to ``pixels``; the smaller of two equally near ones."""
        return _nearest(pixels, self.side, self.side, self.max_side)

    def nearest_frames(self, frames: int) -> int:
        """The legal frame count nearest to ``frames``; the smaller of two equally near ones."""
        return 1 + _nearest(frames - 1, self.temporal, 0, self.max_frames - 1)


def _nearest(value: int, step: int, low: int, high: int) -> int:
    return min(max(-((step // 2 - value) // step) * step, low), high)
