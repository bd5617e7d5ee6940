"""Does the asked motion happen?  A tracker for rendered or generated clips; numpy only.

The tracker knows the clean background and the colour of the shape.  Each pixel's coverage is its
position on the line from background to colour; centre, size and angle of the shape follow from the
moments of the coverage.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.clips import DIRECTION, SYMMETRY, Motion, Scene

Floats = NDArray[np.float32]

LEAST_TRAVEL = 5.0
"""Pixels the centre must move along the asked axis, and the most it may drift otherwise."""
LEAST_SCALE = 1.18
"""Ratio of radii that counts as growth; its inverse as shrinking."""
LEAST_TURN = float(np.radians(18))
COLOUR_ERROR = 0.18
"""Largest RGB distance, over sqrt(3), of the shape's inside from its colour."""
BACKGROUND_ERROR = 0.06
"""Largest mean absolute difference of the pixels off the shape from the background."""


@dataclass(frozen=True)
class Track:
    """What the tracker measured.  Arrays run over the frames; lengths are pixels."""

    x: Floats
    y: Floats
    radius: Floats
    """Square root of the covered area."""
    angle: Floats
    """Unwrapped, radians clockwise; zeros for circles."""
    colour_error: float
    background_error: float


@dataclass(frozen=True)
class Verdict:
    """Score of one clip; ``right`` is the figure that the gates use."""

    motion: bool
    colour: bool
    background: bool

    @property
    def right(self) -> bool:
        """Motion, colour and background all as asked."""
        return self.motion and self.colour and self.background


def coverage(frames: Floats, scene: Scene) -> Floats:
    """Share of each pixel covered by the shape, (t, h, w) in [0, 1]."""
    axis = scene.rgb - scene.background
    share = ((frames - scene.background) * axis).sum(-1) / (axis**2).sum(-1)
    return np.where(share > 0.3, np.clip(share, 0, 1), 0).astype(np.float32)


def _angles(cover: Floats, x: Floats, y: Floats, fold: int) -> Floats:
    """Angle of a shape with ``fold``-fold symmetry in each frame, unwrapped over time."""
    _, height, width = cover.shape
    dx = np.arange(width)[None, None] + 0.5 - x[:, None, None]
    dy = np.arange(height)[None, :, None] + 0.5 - y[:, None, None]
    moment = (cover * (dx + 1j * dy) ** fold).sum((1, 2))
    return np.unwrap(np.angle(moment)).astype(np.float32) / fold


def track(frames: Floats, scene: Scene) -> Track:
    """Follow the scene's shape through ``frames`` (t, h, w, 3) in [0, 1]."""
    cover = coverage(frames, scene)
    area = cover.sum((1, 2))
    mass = np.maximum(area, 1e-6)
    _, height, width = cover.shape
    x = (cover.sum(1) * (np.arange(width) + 0.5)).sum(1) / mass
    y = (cover.sum(2) * (np.arange(height) + 0.5)).sum(1) / mass
    fold = SYMMETRY[scene.shape]
    angle = _angles(cover, x, y, fold) if fold else np.zeros(len(frames), np.float32)
    inside = cover > 0.7
    colour_error = 1.0
    if inside.any():
        colour_error = float(np.linalg.norm(frames[inside].mean(0) - scene.rgb) / 3**0.5)
    off = cover < 0.01
    difference = np.abs(frames - scene.background).mean(-1)
    background_error = float(difference[off].mean()) if off.any() else 1.0
    return Track(x, y, np.sqrt(area), angle, colour_error, background_error)


def _moved(measured: Track, kind: str) -> bool:
    """Whether the centre went the asked way, and hardly any other."""
    dx, dy = (float(a[-2:].mean() - a[0]) for a in (measured.x, measured.y))
    ax, ay = DIRECTION[kind]
    along, across = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)
    return along >= LEAST_TRAVEL and across < 0.5 * along


def _hopped(measured: Track) -> bool:
    """Whether the shape rose and came back."""
    rise = float(measured.y[0] - measured.y.min())
    back = abs(float(measured.y[-1] - measured.y[0]))
    drift = float(np.abs(measured.x - measured.x[0]).max())
    return rise >= LEAST_TRAVEL and back < 0.5 * rise and drift < LEAST_TRAVEL


def motion_happened(measured: Track, motion: Motion) -> bool:
    """Whether a track shows the asked motion; a shape that vanishes shows none."""
    if measured.radius.min() < 2.0:
        return False
    kind = motion.kind
    if kind in DIRECTION:
        return _moved(measured, kind)
    if kind == "bounce":
        return _hopped(measured)
    drift = np.hypot(measured.x - measured.x[0], measured.y - measured.y[0]).max()
    if drift >= LEAST_TRAVEL:
        return False
    scale = float(measured.radius[-2:].mean() / measured.radius[0])
    if kind == "grow":
        return scale >= LEAST_SCALE
    if kind == "shrink":
        return scale <= 1 / LEAST_SCALE
    turn = float(measured.angle[-1] - measured.angle[0])
    steady = 1 / LEAST_SCALE < scale < LEAST_SCALE
    return steady and turn * (1 if kind == "clockwise" else -1) >= LEAST_TURN


def judge(frames: Floats, scene: Scene, motion: Motion) -> Verdict:
    """Score ``frames`` (t, h, w, 3) in [0, 1] of a scene against the asked motion."""
    measured = track(frames, scene)
    return Verdict(
        motion=motion_happened(measured, motion),
        colour=measured.colour_error <= COLOUR_ERROR,
        background=measured.background_error <= BACKGROUND_ERROR,
    )


def psnr(a: Floats, b: Floats) -> float:
    """Peak signal-to-noise ratio in dB of two arrays in [0, 1]."""
    return float(-10 * np.log10(max(float(np.mean((a - b) ** 2)), 1e-12)))
