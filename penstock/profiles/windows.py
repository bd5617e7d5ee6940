"""Long videos as windows along time that overlap: how many, where, and what each result counts.

Source of the windows: "MultiDiffusion", arXiv:2302.08113, whose overlapping crops are denoised
apart and averaged at each step; along time "Gen-L-Video", arXiv:2305.18264, does so. Weights that
fall off towards a window's ends ("pyramid") are among those that AnimateDiff-Evolved offers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Windows:
    """Windows of one length, as few as overlap enough.

    Attributes:
        length: of a window.
        overlap: the least that two neighbours have in common.
    """

    length: int
    overlap: int

    def latent(self, factor: int) -> Windows:
        """Return those of video frames in latent frames, each but the first of ``factor``
        frames."""
        return Windows((self.length - 1) // factor + 1, self.overlap // factor)

    def starts(self, total: int) -> tuple[int, ...]:
        """Return where each of them begins, spread evenly: the first at the beginning of ``total``,
        the last at its end. One that holds everything begins at 0."""
        if total <= self.length:
            return (0,)
        count = -(-(total - self.overlap) // (self.length - self.overlap))
        free = total - self.length
        return tuple(index * free // (count - 1) for index in range(count))

    def parts(self, total: int) -> tuple[slice, ...]:
        """Return what each of them covers of ``total``."""
        return tuple(slice(at, min(at + self.length, total)) for at in self.starts(total))

    def weights(self, total: int) -> tuple[tuple[float, ...], ...]:
        """Return what each window's result counts at each of its places: less and less from its
        middle to its ends. Together the windows count 1 everywhere."""
        parts = self.parts(total)
        sums = [0.0] * total
        for part in parts:
            for at in range(part.start, part.stop):
                sums[at] += _height(at, part)
        return tuple(
            tuple(_height(at, part) / sums[at] for at in range(part.start, part.stop))
            for part in parts
        )


def _height(at: int, part: slice) -> float:
    return float(min(at + 1 - part.start, part.stop - at))
