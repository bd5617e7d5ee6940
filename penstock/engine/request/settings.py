"""From what a user said to a full request: what is left open takes the model's defaults.

A model folder may carry a ``defaults.json`` (width, height, frames, steps, guidance_scale, shift,
fps, window, overlap, negative_prompt, clip_crop) where the official Wan2.1 defaults do not suit it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from penstock.engine.model.grid import Grid
from penstock.engine.model.official import Official
from penstock.engine.request.generation import (
    DISTILLED,
    DISTILLED_SAMPLERS,
    GenerationRequest,
    check_shift,
    parse_area,
    parse_guidance,
    parse_size,
    size_for,
)
from penstock.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from penstock.engine.media.seam import Clip

_NUMBERS = (
    "width", "height", "frames", "steps", "guidance_scale", "shift", "fps", "window", "overlap",
)  # fmt: skip


ANY_SEED = -1


@dataclass(frozen=True)
class Settings:
    """A request with gaps: None means "the model's default"; ``distilled`` fills those that are
    left open with `penstock.engine.request.generation.DISTILLED`. A guidance scale may be a text as
    `penstock.engine.request.generation.parse_guidance` reads it."""

    prompt: str
    image: Path | None = None
    negative_prompt: str | None = None
    size: str | None = None
    max_area: str | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | str | None = None
    shift: float | None = None
    seed: int | None = None
    sampler: str | None = None
    fps: float | None = None
    distilled: bool = False
    clip_crop: str | None = None
    fit: str | None = None
    last_image: Path | None = None
    after: Path | None = None
    guidance_high: float | None = None
    nag_scale: float | None = None
    cfg_interval: str | None = None
    window: int | None = None
    overlap: int | None = None


_CONTINUED = (
    "prompt", "negative_prompt", "steps", "guidance_scale", "guidance_high", "nag_scale",
    "cfg_interval", "shift", "seed", "sampler", "distilled", "clip_crop", "fit", "window",
    "overlap",
)  # fmt: skip
"""Of the settings in a video's metadata, those that one which goes on from it takes over."""


def going_on(settings: Settings, clip: Clip, frame: Path) -> Settings:
    """Return ``settings`` with their gaps filled by what ``clip`` was made with, and from its last
    frame.

    Args:
        settings: a blank prompt is a gap; a picture or a size is none.
        clip: the video that goes on.
        frame: where its last frame lies as a picture.

    Raises:
        UsageError: a picture or a size is given, or a prompt is not, neither here nor there.
    """
    for name in ("image", "size", "max_area"):
        if getattr(settings, name) is not None:
            told = f"{name} is given for a video that goes on from another"
            raise UsageError(told, expected="its last frame and its size", found=name)
    theirs = {n: clip.settings[n] for n in _CONTINUED if clip.settings.get(n) is not None}
    said = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if not settings.prompt.strip():
        del said["prompt"]
    # Gaps by what they are: a seed of 0 equals False, and is one.
    ours = {name: value for name, value in said.items() if value is not None and value is not False}
    full = ours.get("sampler") not in (None, *DISTILLED_SAMPLERS)
    if full if theirs.get("distilled") else "distilled" in ours:  # theirs are another model's
        for name in (*DISTILLED, "guidance_high", "cfg_interval"):
            theirs.pop(name, None)
    if "window" in ours:  # an overlap is one of windows so long
        theirs.pop("overlap", None)
    if "guidance_scale" in ours:  # what stood beside theirs may not go with it
        scale = ours["guidance_scale"]
        low, high = parse_guidance(scale) if isinstance(scale, str) else (scale, None)
        guided = max(low, high or low) > 1
        for name in ("guidance_high", "nag_scale" if guided else "cfg_interval"):
            theirs.pop(name, None)
    if "prompt" not in theirs | ours:
        raise UsageError(
            f"{clip.path} has no prompt stored in it", expected="a prompt", found="no --prompt"
        )
    ends = {"image": frame, "size": clip.size, "after": clip.path}
    return Settings(**({"fps": clip.fps} | theirs | ours | ends))


class Suited(Protocol):
    """What a model says of the requests that suit it."""

    @property
    def official(self) -> Official:
        """As it was released."""

    @property
    def grid(self) -> Grid:
        """The sizes that it can represent."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of its folder, not checked yet."""

    @property
    def origin(self) -> str:
        """Where it is, for messages."""


def resolve(settings: Settings, model: Suited) -> GenerationRequest:
    """Fill the gaps of ``settings`` from the model's defaults, and the size from the picture; the
    flow shift, where none is said, follows that size. A seed of -1 is an open one, as elsewhere.

    Raises:
        UsageError: both a size and an area; RequestError, ImageError: as the request itself.
        CheckpointError: the model's defaults.json is damaged.
    """
    if settings.size is not None and settings.max_area is not None:
        raise UsageError(
            "--size and --max-area cannot be used together",
            expected="--size or --max-area",
            found="both",
        )
    defaults = dict(model.official.request_defaults)
    defaults |= _defaults(model.defaults, model.origin)
    if settings.seed == ANY_SEED:
        settings = replace(settings, seed=None)
    given = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.name not in ("size", "max_area") and getattr(settings, field.name) is not None
    }
    if isinstance(settings.guidance_scale, str):
        given["guidance_scale"], high = parse_guidance(settings.guidance_scale)
        given |= {} if high is None else {"guidance_high": high}
    if "guidance_scale" in given or "guidance_scale" in model.defaults or settings.distilled:
        defaults.pop("guidance_high", None)  # what is said of both counts for both
    if settings.distilled:
        defaults |= DISTILLED
    width, height = _size(settings, defaults, model.grid)
    values = defaults | given
    check_shift(values.get("shift"))  # it is reckoned with before the request is made
    shift = model.official.flow_shift(width, height, values.get("shift"))
    found = {"width": width, "height": height, "shift": shift, "grid": model.grid}
    return GenerationRequest(**(values | found))


def _defaults(found: Mapping[str, Any], origin: str) -> dict[str, Any]:
    texts = {"negative_prompt", "clip_crop"}
    unknown = sorted(found.keys() - set(_NUMBERS) - texts)
    wrong = [
        name
        for name, value in found.items()
        if type(value) not in ((str,) if name in texts else (int, float))
    ]
    if unknown or wrong:
        raise CheckpointError(
            f"defaults.json of {origin} cannot be used",
            expected="numbers named "
            + ", ".join(_NUMBERS)
            + " and texts negative_prompt, clip_crop",
            found=", ".join(unknown + wrong),
        )
    return dict(found)


def _size(settings: Settings, defaults: dict[str, Any], grid: Grid) -> tuple[int, int]:
    if settings.size is not None:
        return parse_size(settings.size)
    width, height = defaults["width"], defaults["height"]
    if settings.max_area is None and settings.image is None:
        return width, height
    area = width * height if settings.max_area is None else parse_area(settings.max_area)
    if settings.image is None:
        return size_for((width, height), area, grid)
    from penstock.engine.media.picture import measure  # Pillow and numpy, for a picture alone

    picture = measure(settings.image)
    return size_for((picture.width, picture.height), area, grid)
