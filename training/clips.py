"""The data maker: short clips of one moving shape, with captions from a grammar.

Everything is drawn from a seed.  ``Scene`` is the still picture, ``Motion`` what happens to it;
``render`` draws the frames and ``caption`` says it in words.  Run as a program it writes sample
pictures: ``python -m training.clips penstock/assets --count 4``.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SPLITS = {"train": 0, "validation": 1, "test": 2, "demo": 3}
"""Seed families; a clip of one family can never be drawn in another."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.72, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.88, 0.10),
    "orange": (0.97, 0.52, 0.05),
    "purple": (0.60, 0.15, 0.80),
    "cyan": (0.10, 0.82, 0.88),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star", "bar")
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "bar": 2}
"""Rotations by 1/n of a turn leave the shape as it is; 0 means any rotation does."""

OPPOSITE = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "grow": "shrink",
    "shrink": "grow",
    "clockwise": "counter-clockwise",
    "counter-clockwise": "clockwise",
}
MOTIONS = (*OPPOSITE, "bounce")
SPEEDS = ("slowly", "", "quickly")
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = {"slowly": 10.0, "": 15.0, "quickly": 20.0}
"""Pixels from the first frame to the last."""
SCALE = {"slowly": 1.4, "": 1.65, "quickly": 1.9}
"""Growth of the radius from the first frame to the last; shrinking is its inverse."""
TURN = {"slowly": math.radians(45), "": math.radians(70), "quickly": math.radians(95)}
HOPS = {"slowly": (1, 10.0), "": (1, 14.0), "quickly": (2, 14.0)}
"""Bounces in a clip and their height in pixels."""

REACH = 1.45
"""Farthest point of any shape from its centre, in radii."""
BACKGROUNDS = ("plain", "gradient", "textured")
PHRASES = {
    "left": ("moves to the left", "moves left", "slides to the left"),
    "right": ("moves to the right", "moves right", "slides to the right"),
    "up": ("moves up", "moves upwards", "slides up"),
    "down": ("moves down", "moves downwards", "slides down"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "clockwise": ("rotates clockwise", "turns clockwise", "spins clockwise"),
    "counter-clockwise": (
        "rotates counter-clockwise",
        "turns counter-clockwise",
        "spins counter-clockwise",
    ),
    "bounce": ("bounces", "bounces up and down", "jumps up and down"),
}


@dataclass(frozen=True)
class Motion:
    """What the shape does: one of ``MOTIONS`` at one of ``SPEEDS``."""

    kind: str
    speed: str = ""


@dataclass(frozen=True)
class Scene:
    """A still picture: one shape on a background.  Lengths are pixels, angles radians."""

    shape: str
    colour: str
    radius: float
    tilt: float
    x: float
    y: float
    kind: str
    background: Floats
    """(h, w, 3) in [0, 1]."""

    @property
    def rgb(self) -> Floats:
        """The shape's colour, (3,) in [0, 1]."""
        return np.array(COLOURS[self.colour], np.float32)


def rng_for(split: str, index: int) -> np.random.Generator:
    """The generator of scene ``index`` of a seed family."""
    return np.random.default_rng([SPLITS[split], index])


def _texture(rng: np.random.Generator, height: int, width: int) -> Floats:
    """A pattern (h, w) in [-1, 1]: stripes, checks or smooth noise."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    kind = rng.integers(3)
    if kind == 0:
        angle, period = rng.uniform(0, math.pi), rng.uniform(9, 18)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    elif kind == 1:
        period = rng.uniform(14, 24)
        wave = np.sin(x * 2 * math.pi / period) * np.sin(y * 2 * math.pi / period)
    else:
        wave = np.zeros((height, width), np.float32)
        for _ in range(5):
            fx, fy = rng.uniform(-0.4, 0.4, 2)
            wave = wave + np.sin(x * fx + y * fy + rng.uniform(0, 2 * math.pi))
        wave = wave / 3
    return np.clip(wave, -1, 1).astype(np.float32)


def _muted(rng: np.random.Generator) -> Floats:
    """A greyish colour (3,) in [0, 1]."""
    return np.clip(rng.uniform(0.08, 0.85) + rng.normal(0, 0.09, 3), 0, 1).astype(np.float32)


def _background(rng: np.random.Generator, kind: str, height: int, width: int) -> Floats:
    base = np.broadcast_to(_muted(rng), (height, width, 3))
    if kind == "gradient":
        y, x = np.mgrid[:height, :width].astype(np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        ramp = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
        base = base + ramp[..., None] * rng.uniform(-0.35, 0.35, 3)
    elif kind == "textured":
        base = base + _texture(rng, height, width)[..., None] * rng.uniform(0.03, 0.09, 3)
    return np.clip(base, 0, 1).astype(np.float32)


def random_scene(rng: np.random.Generator, height: int = 64, width: int = 64) -> Scene:
    """A picture whose shape lies wholly inside and stands out from its background."""
    radius = float(rng.uniform(6.5, 10.5))
    margin = REACH * radius + 1
    shape = str(rng.choice(SHAPES))
    colour = str(rng.choice(list(COLOURS)))
    kind = str(rng.choice(BACKGROUNDS))
    background = _background(rng, kind, height, width)
    while np.linalg.norm(background - np.array(COLOURS[colour]), axis=-1).min() < 0.45:
        background = _background(rng, kind, height, width)
    return Scene(
        shape=shape,
        colour=colour,
        radius=radius,
        tilt=0.0 if shape == "circle" else float(rng.uniform(-0.3, 0.3)),
        x=float(rng.uniform(margin, width - margin)),
        y=float(rng.uniform(margin, height - margin)),
        kind=kind,
        background=background,
    )


def path(scene: Scene, motion: Motion, frames: int) -> Floats:
    """Centre x, centre y, radius and tilt in every frame, (frames, 4)."""
    s = np.linspace(0, 1, frames, dtype=np.float32)
    x, y = np.full(frames, scene.x), np.full(frames, scene.y)
    radius, tilt = np.full(frames, scene.radius), np.full(frames, scene.tilt)
    if motion.kind in DIRECTION:
        dx, dy = DIRECTION[motion.kind]
        x, y = x + dx * TRAVEL[motion.speed] * s, y + dy * TRAVEL[motion.speed] * s
    elif motion.kind in ("grow", "shrink"):
        sign = 1 if motion.kind == "grow" else -1
        radius = radius * SCALE[motion.speed] ** (sign * s)
    elif motion.kind == "bounce":
        hops, rise = HOPS[motion.speed]
        y = y - rise * np.abs(np.sin(math.pi * hops * s))
    else:
        sign = 1 if motion.kind == "clockwise" else -1
        tilt = tilt + sign * TURN[motion.speed] * s
    return np.stack([x, y, radius, tilt], axis=1).astype(np.float32)


def fits(scene: Scene, motion: Motion) -> bool:
    """Whether the shape stays wholly inside the picture, and the motion can be seen."""
    if SYMMETRY[scene.shape] == 0 and "clockwise" in motion.kind:
        return False
    x, y, radius, _ = path(scene, motion, 17).T
    height, width, _ = scene.background.shape
    reach = REACH * radius
    inside = (x >= reach) & (y >= reach) & (x <= width - reach) & (y <= height - reach)
    return bool(inside.all())


def possible_motions(scene: Scene) -> list[Motion]:
    """Every motion that fits the scene."""
    every = [Motion(kind, speed) for kind in MOTIONS for speed in SPEEDS]
    return [motion for motion in every if fits(scene, motion)]


def random_motion(rng: np.random.Generator, scene: Scene) -> Motion:
    """A motion that fits, each kind as likely as the others."""
    possible = possible_motions(scene)
    kind = rng.choice(sorted({motion.kind for motion in possible}))
    choices = [motion for motion in possible if motion.kind == kind]
    return choices[int(rng.integers(len(choices)))]


def _distance(shape: str, x: Floats, y: Floats, radius: Floats) -> Floats:
    """Signed distance in pixels to the outline of an upright shape (negative inside)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "bar":
        return np.maximum(np.abs(x) - 1.3 * radius, np.abs(y) - 0.55 * radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":
        slanted = math.sqrt(0.75) * np.abs(x) - 0.5 * y
        return np.maximum(slanted, y) - 0.68 * radius
    half = math.pi / SYMMETRY[shape]
    rho, theta = np.hypot(x, y), np.arctan2(x, -y)
    theta = np.abs((theta + half) % (2 * half) - half)
    tip, notch = 1.42, 0.66
    ex, ey = notch * math.cos(half) - tip, notch * math.sin(half)
    length = math.hypot(ex, ey)
    return (ey * (rho * np.cos(theta) - tip * radius) - ex * rho * np.sin(theta)) / length


def render(scene: Scene, motion: Motion | None = None, frames: int = 17) -> Floats:
    """Anti-aliased frames (frames, h, w, 3) in [0, 1]; without a motion the shape stands still."""
    height, width, _ = scene.background.shape
    if motion is None:
        track = np.tile(np.float32([scene.x, scene.y, scene.radius, scene.tilt]), (frames, 1))
    else:
        track = path(scene, motion, frames)
    cx, cy, radius, tilt = (column[:, None, None] for column in track.T)
    gx = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - cx
    gy = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - cy
    x, y = gx * np.cos(tilt) + gy * np.sin(tilt), gy * np.cos(tilt) - gx * np.sin(tilt)
    alpha = np.clip(0.5 - _distance(scene.shape, x, y, radius), 0, 1)[..., None]
    drawn: Floats = (scene.background + alpha * (scene.rgb - scene.background)).astype(np.float32)
    return drawn


def subject(rng: np.random.Generator, scene: Scene) -> str:
    """The scene in words, sometimes with its size or its background."""
    size = ""
    if scene.radius < 7.6:
        size = str(rng.choice(["", "small "]))
    elif scene.radius > 9.4:
        size = str(rng.choice(["", "large "]))
    place = f" on a {scene.kind} background" if rng.random() < 0.2 else ""
    article = "an" if not size and scene.colour == "orange" else "a"
    return f"{article} {size}{scene.colour} {scene.shape}{place}"


def caption(rng: np.random.Generator, scene: Scene, motion: Motion) -> str:
    """A sentence such as "a red circle moves to the right, slowly"."""
    phrases = PHRASES[motion.kind]
    phrase = phrases[int(rng.choice(len(phrases), p=(0.6, 0.2, 0.2)))]
    pace = f", {motion.speed}" if motion.speed else ""
    return f"{subject(rng, scene)} {phrase}{pace}"


def vocabulary() -> list[str]:
    """Sentences that use every word of the grammar, for the tokenizer."""
    words = [f"a small {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    words += [f"an orange large on a {kind} background" for kind in BACKGROUNDS]
    words += [f"{p}, {s}" for ps in PHRASES.values() for p in ps for s in ("slowly", "quickly")]
    return words


def open_scenes(split: str) -> Iterator[tuple[int, Scene]]:
    """Scenes of a seed family, with their index, in which every kind of motion has room."""
    for index in itertools.count():
        scene = random_scene(rng_for(split, index))
        if {motion.kind for motion in possible_motions(scene)} == set(MOTIONS):
            yield index, scene


def main() -> None:
    """Write sample first frames as PNG files, with what they show on standard output."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for number, (index, scene) in enumerate(itertools.islice(open_scenes("demo"), args.count)):
        picture = (render(scene, frames=1)[0] * 255).round().astype(np.uint8)
        name = f"demo{number or ''}.png"
        Image.fromarray(picture).save(args.folder / name)
        print(f"{name}: {subject(rng_for('demo', index), scene)}")


if __name__ == "__main__":
    main()
