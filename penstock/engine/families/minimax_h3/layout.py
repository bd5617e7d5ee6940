"""The packed sequence: which rows are what, where each stands in time and in the picture, and how
latents become rows.

A sequence is text, pictures that are given, sound, video; each of them one run of rows.
Source: diffusers' ``MiniMaxH3PrepareLayoutStep``, whose figures are fp64 and are kept so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.config import CHANNELS, PATCH_TAKEN, SOUND, VIDEO
from penstock.engine.families.minimax_h3.sizes import CLIP_LATENTS, Latents

_RESCALE = 5.0 / 3.0
_SPANS = (1, 4, 4, 4, 4)
"""Frames of the video that each latent frame of a clip stands for."""
_ACROSS = 32
"""What the picture's sides span, of an area of one."""


@dataclass(frozen=True)
class Run:
    """Rows that are modulated alike.

    Attributes:
        start, stop: in the sequence.
        tag: their modality.
        time: whose timestep is theirs: "video", "sound" or "given".
    """

    start: int
    stop: int
    tag: int
    time: str


@dataclass(frozen=True)
class Layout:
    """A packed sequence.

    Attributes:
        latents: sizes of what is denoised.
        tags: the modality of each row of text; a given picture's rows in it are the video's.
        anchors: of the given pictures: "first" or "last".
    """

    latents: Latents
    tags: tuple[int, ...]
    anchors: tuple[str, ...] = ()

    @property
    def text(self) -> slice:
        """The text's rows."""
        return slice(0, len(self.tags))

    @property
    def given(self) -> slice:
        """Those of given pictures."""
        return slice(self.text.stop, self.text.stop + len(self.anchors) * self.latents.frame_rows)

    @property
    def sound(self) -> slice:
        """The sound's, channel by channel."""
        return slice(self.given.stop, self.given.stop + self.latents.sound_rows)

    @property
    def video(self) -> slice:
        """The video's."""
        return slice(self.sound.stop, self.sound.stop + self.latents.video_rows)

    @property
    def rows(self) -> int:
        """Of the whole sequence."""
        return int(self.video.stop)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All rows, in order."""
        return tuple(self._runs())

    def _runs(self) -> Iterator[Run]:
        start = 0
        for at in range(1, len(self.tags) + 1):
            if at == len(self.tags) or self.tags[at] != self.tags[start]:
                yield Run(start, at, self.tags[start], "video")  # the text's time is the video's
                start = at
        for part, tag, time in (
            (self.given, VIDEO, "given"), (self.sound, SOUND, "sound"), (self.video, VIDEO, "video")
        ):  # fmt: skip
            if part.start < part.stop:
                yield Run(part.start, part.stop, tag, time)

    def positions(self) -> Tensor:
        """Return the time, height and width of every row: (rows, 3), fp64."""
        sizes, origin = self.latents, float(len(self.tags))
        found = torch.zeros(self.rows, 3, dtype=torch.float64)
        found[self.text, 0] = torch.arange(len(self.tags), dtype=torch.float64)
        frame, across = _frame_grid(sizes.height, sizes.width)
        for index, anchor in enumerate(self.anchors):
            start = self.given.start + index * sizes.frame_rows
            part = slice(start, start + sizes.frame_rows)
            found[part, 0] = origin if anchor == "first" else _last_time(sizes.frames, origin)
            found[part, 1:] = frame
        ticks = origin + torch.arange(sizes.sound, dtype=torch.float64)
        found[self.sound, 0] = ticks.repeat(CHANNELS)
        ends = (torch.full((sizes.sound,), float(across[end]), dtype=torch.float64)
                for end in (0, -1))  # fmt: skip
        found[self.sound, 2] = torch.cat(list(ends))
        times = _frame_times(sizes.frames, origin)
        found[self.video, 0] = times.repeat_interleave(sizes.frame_rows)
        found[self.video, 1:] = frame.repeat(sizes.frames, 1)
        return found


def _side_grid(size: int, patch: int, root: float) -> Tensor:
    ratio = size / root
    left = (1.0 - ratio) / 2.0
    # numpy's spacing: torch's rounds otherwise
    return torch.from_numpy(
        np.linspace(left, left + ratio, size // patch, endpoint=False) * _ACROSS
    ).to(torch.float64)


def _frame_grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the height and width of the rows of one latent frame, (rows, 2), and the axis of its
    width."""
    root = float(np.sqrt(height * width))
    down, across = (
        _side_grid(size, patch, root)
        for size, patch in zip((height, width), PATCH_TAKEN[1:], strict=True)
    )
    grids = torch.meshgrid(down, across, indexing="ij")
    return torch.stack([grid.reshape(-1) for grid in grids], dim=-1), across


def _frame_times(frames: int, origin: float) -> Tensor:
    spans = [_RESCALE * _SPANS[index % CLIP_LATENTS] for index in range(frames)]
    told = torch.tensor(spans, dtype=torch.float64)
    return origin + torch.cat([torch.zeros(1, dtype=torch.float64), told[:-1].cumsum(0)])


def _last_time(frames: int, origin: float) -> float:
    """Return the time of a picture at the end. numpy adds in pairs, and the makers add so here."""
    spans = np.ones(frames, dtype=np.float64) * _RESCALE
    for offset, count in enumerate(_SPANS):
        spans[offset::CLIP_LATENTS] *= count
    return origin + float(spans.sum()) - _RESCALE


def to_rows(latents: Tensor, patch: Sequence[int] = PATCH_TAKEN) -> Tensor:
    """Turn the latents of a video, (1, c, t, h, w), into its rows, (rows, c * volume of a
    patch)."""
    _, channels, *sizes = latents.shape
    t, h, w = (size // cut for size, cut in zip(sizes, patch, strict=True))
    pt, ph, pw = patch
    x = latents.reshape(channels, t, pt, h, ph, w, pw)
    # (c, t, pt, h, ph, w, pw) -> (t, h, w, c, pt, ph, pw)
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1).contiguous()


def from_rows(rows: Tensor, sizes: Latents, patch: Sequence[int] = PATCH_TAKEN) -> Tensor:
    """Do the reverse of `to_rows`."""
    pt, ph, pw = patch
    t, h, w = sizes.frames // pt, sizes.height // ph, sizes.width // pw
    x = rows.reshape(t, h, w, -1, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return x.reshape(1, -1, sizes.frames, sizes.height, sizes.width).contiguous()


def pack(video: Tensor, sound: Tensor) -> Tensor:
    """Return the latents of a video and its sound as one tensor, (1, n): what is sampled and kept.

    Args:
        video: (1, c, t, h, w).
        sound: (2, c, n), a channel a row.
    """
    return torch.cat([video.reshape(1, -1), sound.reshape(1, -1)], dim=1)


def unpack(packed: Tensor, sizes: Latents) -> tuple[Tensor, Tensor]:
    """Return views of what was packed: (1, c, t, h, w) and (2, c, n)."""
    video, sound = packed[0, : sizes.video_elements], packed[0, sizes.video_elements :]
    return (
        video.view(1, sizes.channels, sizes.frames, sizes.height, sizes.width),
        sound.view(CHANNELS, sizes.sound_channels, sizes.sound),
    )


def sound_rows(sound: Tensor) -> Tensor:
    """Turn the latents of the sound, (2, c, n), into rows, (2n, c)."""
    return sound.permute(0, 2, 1).reshape(-1, sound.shape[1])


def sound_latents(rows: Tensor, sizes: Latents) -> Tensor:
    """Do the reverse of `sound_rows`."""
    return rows.reshape(CHANNELS, sizes.sound, -1).permute(0, 2, 1).contiguous()


def volume_of(patch: Sequence[int]) -> int:
    """Return the latents of a channel in one row."""
    return math.prod(patch)
