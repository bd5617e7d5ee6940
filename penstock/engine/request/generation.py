"""What to generate: a request that is legal by construction, and the sizes Wan2.1 knows.

Pure and torch-free. An illegal value raises `RequestError` with the nearest legal one.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from penstock.engine.model.grid import Grid
from penstock.errors import RequestError, brief
from penstock.profiles.manifest import Pictures, VideoShape
from penstock.profiles.phases import Noise, Workload
from penstock.profiles.windows import Windows

SAMPLERS = ("unipc", "dpm++", "euler", "lcm")
CLIP_CROPS = ("squash", "center")
FITS = ("crop", "pad", "stretch")
DISTILLED: Mapping[str, Any] = MappingProxyType(
    {"distilled": True, "steps": 4, "guidance_scale": 1.0, "shift": 5.0, "sampler": "lcm"}
)
"""Fields that suit a model, or a LoRA, distilled to four steps without guidance. Source: LightX2V's
``configs/distill/wan21`` and its ``WanStepDistillScheduler``, which adds fresh noise at each step
as latent consistency models do (arXiv:2310.04378)."""
DISTILLED_SAMPLERS = ("lcm", "euler")
"""That can take the noise levels of such a model."""
AREAS = {"480p": 480 * 832, "720p": 720 * 1280}
MAX_SEED = (1 << 32) - 1
_LARGEST = 1e300
MAX_STEPS = 1000
MAX_FPS = 240
MAX_NAG = 100
"""Of its scale: what it leads to grows no further, and 16 bits would overflow on the way."""
COHERENT_FRAMES = Grid.coherent
"""Of Wan2.1."""
WINDOW = 81
"""Frames that Wan2.1 was trained on, and of the windows that a long video is denoised in."""
OVERLAP_SHARE = 5
"""A window over what two neighbours have in common, where nothing is said."""

_NTSC = 1.001
"""What colour television divided whole frame rates by."""
_ROUNDED = 5e-3
"""How far such a rate may be from what its digits say: 23.98 is meant for 23.976 as well."""

_SIZE = re.compile(r"\s*(\d{1,9})\s*[xX*×]\s*(\d{1,9})\s*")


@dataclass(frozen=True)
class RequestWarning:
    """Something legal that is likely not what the user wants.

    Attributes:
        code: stable name for programs.
        message: one sentence: what will happen and what to do instead.
    """

    code: str
    message: str


@dataclass(frozen=True)
class GenerationRequest:
    """One video to generate. Immutable, hashable, and checked when it is constructed. What is left
    open is as Wan2.1 I2V has it; `Engine.request` takes the model's own defaults.

    Attributes:
        prompt: text prompt; must not be blank.
        image: start image (the first frame), or None for text to video.
        last_image: end image (the last frame), for models that take one.
        negative_prompt: negative prompt; None: the model's default, ``""``: none.
        width, height: size in pixels, multiples of ``grid.side``.
        frames: number of frames, ``4n+1``.
        steps: number of denoising steps.
        guidance_scale: classifier-free guidance (CFG) scale; 1 or less turns guidance off (one
            forward pass a step).
        guidance_high: CFG scale of the high-noise transformer of a model with two;
            ``guidance_scale`` is then that of the low-noise one. None: the same for both.
        shift: flow shift of the noise schedule; None: the official one for the size.
        seed: seed of the noise, 0 to 2**32-1, or None to draw one (`with_seed`).
        sampler: one of `SAMPLERS`.
        fps: frames per second of the file; the model was trained at 16. May have a fraction, such
            as 23.976 (see `frame_rate`).
        distilled: use the noise levels that distilled models were trained at: before the shift,
            1000, 750, 500 and 250 of 1000 for four steps; for "lcm" and "euler".
        clip_crop: what the image encoder sees of the image: "squash", all of it squeezed into a
            square, as Wan's makers do; or "center", the square in its middle, as diffusers does.
        fit: how an image of another aspect ratio than the video's is fitted: "crop" around its
            middle, "pad" with black, or "stretch". One that differs by less than a cell of ``grid``
            is resized as it is.
        nag_scale: scale of normalized attention guidance, which applies the negative prompt inside
            text attention where CFG is off. Above 1; None: off.
        cfg_interval: "A,B": classifier-free guidance only at steps that begin at a noise level from
            A to B, of 0 to 1; at the others the prompt alone is followed, in one pass. None: at
            all steps.
        after: video to continue: its frames come first in the file, ``image`` is its last frame,
            and the colours of the new frames are matched to it.
        window: frames of each context window of a long video; 0: no windows; None: 81, for more
            than the 121 frames that stay coherent.
        overlap: frames shared by neighbouring windows, at least; None: a fifth of a window.
        grid: sizes and frame counts that the model can represent.

    Raises:
        RequestError: a field is illegal; says what was expected and the nearest legal value.
    """

    prompt: str
    image: Path | None = None
    negative_prompt: str | None = None
    width: int = 1280
    height: int = 720
    frames: int = 81
    steps: int = 40
    guidance_scale: float = 5.0
    shift: float | None = None
    seed: int | None = None
    sampler: str = "unipc"
    fps: float = 16
    distilled: bool = False
    clip_crop: str = "squash"
    fit: str = "crop"
    last_image: Path | None = None
    guidance_high: float | None = None
    nag_scale: float | None = None
    cfg_interval: str | None = None
    after: Path | None = None
    window: int | None = None
    overlap: int | None = None
    grid: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_shape()
        _check_int("steps", self.steps, 1, MAX_STEPS)
        _check_fps(self.fps)
        _check_guidance(self.guidance_scale)
        if self.guidance_high is not None:
            _check_guidance(self.guidance_high)
        self._check_nag()
        if self.guided_within is not None and max(self.guidance_scales) <= 1:
            raise RequestError(
                "an interval of guidance is for a job with classifier-free guidance",
                expected="a guidance scale above 1",
                found=str(self.guidance_scale),
                remedy="Leave --cfg-interval out; a model that is not distilled takes --cfg above "
                "1 beside it",
            )
        check_shift(self.shift)
        _check_seed(self.seed)
        self._check_windows()
        if self.sampler not in SAMPLERS:
            raise RequestError(
                "unknown sampler", expected=" or ".join(SAMPLERS), found=brief(self.sampler)
            )
        if self.clip_crop not in CLIP_CROPS:
            raise RequestError(
                "unknown clip_crop", expected=" or ".join(CLIP_CROPS), found=repr(self.clip_crop)
            )
        if self.fit not in FITS:
            raise RequestError(
                "unknown way to fit a picture", expected=" or ".join(FITS), found=repr(self.fit)
            )
        if self.distilled and self.sampler not in DISTILLED_SAMPLERS:
            raise RequestError(
                "this sampler cannot take the noise levels of a distilled model",
                expected=" or ".join(DISTILLED_SAMPLERS),
                found=self.sampler,
                remedy="Leave --sampler or --distilled out",
            )

    def _check_texts(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if text is not None and not isinstance(text, str):
                raise RequestError(f"the {name} is not text", expected="str", found=_type(text))
            if text is not None and not _is_unicode(text):
                raise RequestError(
                    f"the {name} is not text in UTF-8",
                    expected="Unicode",
                    found=ascii(text)[:80],
                    remedy="It comes from a file or a terminal of another encoding: convert it, "
                    "for example with iconv -f latin1 -t utf-8",
                )
        if self.prompt is None or not self.prompt.strip():
            raise RequestError(
                "the prompt is empty",
                expected="a description of the video",
                found=brief(self.prompt),
                remedy="Describe the video, e.g. 'the cat turns its head and yawns'",
            )
        for name, image in (("image", self.image), ("last image", self.last_image)):
            if image is not None and not isinstance(image, Path):
                raise RequestError(
                    f"the {name} is not a path",
                    expected="pathlib.Path",
                    found=_type(image),
                    remedy="Wrap it: Path('cat.png')",
                )
        if self.last_image is not None and self.image is None and not self.grid.ends_alone:
            raise RequestError(
                "a last image needs a first image",
                expected="an image",
                found="a last image alone",
                remedy="Give one with --image (image=Path(...))",
            )

    def _check_shape(self) -> None:
        grid = self.grid
        for name, value in (("width", self.width), ("height", self.height)):
            _check_whole(name, value)
            nearest = grid.nearest_side(value)
            if value != nearest:
                raise RequestError(
                    f"illegal {name}",
                    expected=f"a multiple of {grid.side} from {grid.side} to {grid.max_side}",
                    found=brief(value),
                    remedy=f"The nearest legal {name} is {nearest}",
                )
        _check_whole("frames", self.frames)
        nearest = grid.nearest_frames(self.frames)
        if self.frames != nearest:
            raise RequestError(
                "illegal number of frames",
                expected=grid.frames_told,
                found=brief(self.frames),
                remedy=f"The nearest legal number of frames is {nearest}",
            )

    def _check_nag(self) -> None:
        if self.nag_scale is None:
            return
        if not _is_finite(self.nag_scale) or not 1 < self.nag_scale <= MAX_NAG:
            raise RequestError(
                "illegal scale of normalized attention guidance",
                expected=f"a number above 1 and at most {MAX_NAG}, such as 11",
                found=brief(self.nag_scale),
            )
        if max(self.guidance_scales) > 1:
            raise RequestError(
                "normalized attention guidance cannot be combined with classifier-free guidance",
                expected="a guidance scale of 1",
                found=str(self.guidance_scale),
                remedy="Give --cfg 1 as well, or leave --nag out",
            )

    def _check_windows(self) -> None:
        grid, window = self.grid, self.window
        if window is None:
            window = WINDOW if self.frames > grid.coherent or self.overlap is not None else 0
        _check_whole("window", window)
        nearest = grid.nearest_frames(max(window, 2 * grid.temporal + 1))
        if window not in (0, nearest):
            raise RequestError(
                "illegal window",
                expected=f"{grid.temporal}n+1 frames, at least {2 * grid.temporal + 1}, or 0 for "
                "the whole video at once",
                found=brief(window),
                remedy=f"The nearest legal window is {nearest}",
            )
        if self.overlap is not None and window:
            _check_int("overlap", self.overlap, grid.temporal, window // 2)

    @property
    def windows(self) -> Windows | None:
        """The windows in frames that the video is denoised in; None: it is one."""
        window = self.window
        if window is None:
            window = WINDOW if self.frames > self.grid.coherent else 0
        if not 0 < window < self.frames:
            return None
        overlap = window // OVERLAP_SHARE if self.overlap is None else self.overlap
        return Windows(window, max(overlap, self.grid.temporal))

    @property
    def video_shape(self) -> VideoShape:
        """The size as the planner takes it."""
        return VideoShape(self.width, self.height, self.frames)

    @property
    def guidance_scales(self) -> tuple[float, float]:
        """Of the transformer for much noise, and of the one for little or the only one."""
        low = self.guidance_scale
        return low if self.guidance_high is None else self.guidance_high, low

    @property
    def guided_within(self) -> tuple[float, float] | None:
        """The noise levels at which guidance is on, the least and the most; None: all.

        Raises:
            RequestError: `cfg_interval` is no such interval.
        """
        told = self.cfg_interval
        if told is None:
            return None
        try:
            low, high = (float(part) for part in told.split(","))
            if 0 <= low <= high <= 1:
                return low, high
        except (AttributeError, ValueError):
            pass
        raise RequestError(
            "illegal interval of guidance",
            expected='two noise levels from 0 (none) to 1 (nothing else), such as "0.3,0.95"',
            found=brief(told),
        )

    @property
    def pictures(self) -> tuple[Path, ...]:
        """That the video starts from and ends with."""
        return tuple(path for path in (self.image, self.last_image) if path is not None)

    @property
    def uses_guidance(self) -> bool:
        """Whether each step takes a second, unconditional pass."""
        return self.guidance_scale > 1

    def with_seed(self) -> GenerationRequest:
        """Return this request with a seed: its own, or one drawn now.

        Raises:
            Nothing.
        """
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(1 << 32))

    @property
    def warnings(self) -> tuple[RequestWarning, ...]:
        """What is legal here but likely unwanted."""
        found = []
        coherent = self.grid.coherent
        if self.frames > coherent and self.windows is None:
            found.append(
                RequestWarning(
                    "long_video",
                    f"{self.frames} frames: beyond about {coherent} at once the motion"
                    " degenerates or repeats. Let it be denoised in windows (--window), or go on"
                    " from a shorter one (--continue).",
                )
            )
        if 0 < self.guidance_scale < 1:
            found.append(
                RequestWarning(
                    "guidance_off",
                    f"guidance scale {self.guidance_scale}: values up to 1 switch guidance off, as"
                    " in diffusers. Use 0 or 1 to mean that, or a value above 1.",
                )
            )
        return tuple(found)


def workload_of(request: GenerationRequest, *, saved: bool = False) -> Workload:
    """Return the request as the planner takes it; ``kept``: in a job's directory. The header of its
    picture is read, if that lies where the request says.

    Raises:
        ImageError: the picture cannot be used.
    """
    given = request.pictures
    work = Workload(request.video_shape, request.steps, request.uses_guidance, saved)
    high, _ = (scale > 1 for scale in request.guidance_scales)
    work = replace(work, pictures=len(given) or None, guided_high=high, noise=noise_of(request))
    work = replace(work, contrasted=request.nag_scale is not None)
    work = replace(work, guided_within=request.guided_within)
    work = replace(work, windows=request.windows, continued=request.after is not None)
    names = ("picture", "last")
    there = {name: path for name, path in zip(names, given, strict=False) if path.exists()}
    if not there:
        return work
    from penstock.engine.media.picture import measure  # Pillow and numpy, for a picture alone

    measured: dict[str, Any] = {name: measure(path) for name, path in there.items()}
    return replace(work, **measured)


def noise_of(request: GenerationRequest) -> Noise:
    """Return what determines the noise levels of a request."""
    return Noise(request.sampler, request.shift, request.distilled)


def check_pictures(request: GenerationRequest, wanted: Pictures) -> None:
    """Refuse a request whose pictures the model cannot take.

    Args:
        request: the request.
        wanted: what the model takes.

    Raises:
        RequestError: a picture is given that it does not take, or one is missing.
    """
    if wanted.first != "may":
        check_task(request, image_to_video=wanted.first == "must")
    if wanted.last == "must" and request.last_image is None:
        raise RequestError(
            "this model needs a first and a last image",
            expected="a last image",
            found="none",
            remedy="Give one with --last-image (last_image=Path(...)), or use an image-to-video "
            "model",
        )
    if wanted.last == "none" and request.last_image is not None:
        raise RequestError(
            "this model does not take a last image",
            expected="no last image",
            found=str(request.last_image),
            remedy="Leave --last-image out, or use a model that takes it (Wan2.1 FLF2V, Wan2.2 "
            "I2V A14B)",
        )


def check_task(request: GenerationRequest, *, image_to_video: bool) -> None:
    """Refuse a request whose task the model cannot do.

    Args:
        request: the request.
        image_to_video: whether the model is an image-to-video model.

    Raises:
        RequestError: a picture is given to a text-to-video model, or is missing for the other.
    """
    if image_to_video and request.image is None:
        raise RequestError(
            "this is an image-to-video model",
            expected="an image to start from",
            found="none",
            remedy="Give one with --image (image=Path(...)), or use a text-to-video model",
        )
    if not image_to_video and request.image is not None:
        raise RequestError(
            "this is a text-to-video model",
            expected="no image",
            found=str(request.image),
            remedy="Leave the image out, or use an image-to-video model",
        )


def size_for(
    image_size: tuple[int, int], max_area: int, grid: Grid | None = None
) -> tuple[int, int]:
    """Return the largest legal size of the picture's aspect within an area.

    The rule of the official code (``wan/image2video.py``): each side is ``sqrt(area * aspect)``
    rounded down to the grid. Computed in integers, so that an exact side does not fall a step short
    by floating-point rounding.

    Args:
        image_size: width and height of the picture in pixels.
        max_area: pixels a frame may have.
        grid: what the model can represent; Wan2.1's by default.

    Returns:
        Width and height.

    Raises:
        RequestError: the area is too small, or the picture too narrow, for the grid.
    """
    grid = grid or Grid()
    width, height = image_size
    cells = grid.side * grid.side
    sides = (
        grid.side * math.isqrt(max_area * width // (height * cells)),
        grid.side * math.isqrt(max_area * height // (width * cells)),
    )
    if not (grid.side <= min(sides) and max(sides) <= grid.max_side):
        raise RequestError(
            "no legal size has this aspect and area",
            expected=f"sides from {grid.side} to {grid.max_side}",
            found=f"a {width}x{height} picture in {max_area} pixels",
            remedy="Crop the picture, or choose the size yourself with --size",
        )
    return sides


def frame_rate(fps: float) -> Fraction:
    """Return the frames a second as the ratio that is meant: 23.976 is 24000/1001, as are its kin
    (29.97, 59.94); other fractions are taken as they are written."""
    whole = round(fps * _NTSC)
    if not float(fps).is_integer() and abs(fps * _NTSC - whole) < _ROUNDED:
        return Fraction(whole * 1000, 1001)
    return Fraction(repr(fps)).limit_denominator(1001)


def parse_guidance(text: str) -> tuple[float, float | None]:
    """Parse the guidance scale, and that of the transformer for much noise, from ``"3.5"`` or from
    ``"3,4"``: little noise first, as the makers write it.

    Raises:
        RequestError: neither.
    """
    try:
        low, *high = (float(part) for part in text.split(","))
        if len(high) <= 1:
            return low, high[0] if high else None
    except ValueError:
        pass
    raise RequestError(
        "not a guidance scale",
        expected='a number, or for a model of two transformers two like "3,4": for little noise, '
        "for much",
        found=brief(text),
    )


def check_two(request: GenerationRequest, transformers: int) -> None:
    """Refuse a request that speaks of two transformers where there is one.

    Raises:
        RequestError: it does.
    """
    if transformers == 1 and request.guidance_high is not None:
        raise RequestError(
            "this model has one transformer",
            expected="one guidance scale",
            found=f"{request.guidance_scale:g},{request.guidance_high:g}",
            remedy=f"Give --cfg {request.guidance_scale:g}",
        )


def parse_size(text: str) -> tuple[int, int]:
    """Return the width and height from ``"1280x720"`` (also ``1280*720`` as the official code
    writes it).

    Raises:
        RequestError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise RequestError("not a size", expected='like "1280x720"', found=brief(text))
    return int(match[1]), int(match[2])


def parse_area(text: str) -> int:
    """Return the pixels of ``"720p"``, ``"480p"`` or of a size such as ``"528x960"``.

    Raises:
        RequestError: neither.
    """
    named = AREAS.get(text.strip().lower())
    if named is not None:
        return named
    if _SIZE.fullmatch(text) is None:
        raise RequestError(
            "not an area", expected=f'{" or ".join(AREAS)} or like "528x960"', found=brief(text)
        )
    width, height = parse_size(text)
    return width * height


def _is_unicode(text: str) -> bool:
    """Return whether ``text`` is without the lone surrogates that stand for bytes of other
    encodings."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _type(value: object) -> str:
    return type(value).__name__


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number", expected="int", found=brief(value))


def _check_int(name: str, value: int, low: int, high: int) -> None:
    _check_whole(name, value)
    if not low <= value <= high:
        raise RequestError(
            f"{name} out of range",
            expected=f"{low} to {high}",
            found=brief(value),
            remedy=f"The nearest legal value is {min(max(value, low), high)}",
        )


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < _LARGEST  # NaN is not, and a whole number may have any length


def _check_fps(value: float) -> None:
    if not _is_finite(value) or not 1 <= value <= MAX_FPS:
        raise RequestError(
            "fps out of range",
            expected=f"1 to {MAX_FPS}, a fraction such as 23.976 among them",
            found=brief(value),
            remedy=f"The nearest legal value is {min(max(value, 1), MAX_FPS):g}"
            if _is_finite(value)
            else "The model was trained at 16",
        )


def _check_guidance(value: float) -> None:
    if not _is_finite(value) or value < 0:
        raise RequestError(
            "illegal guidance scale",
            expected="a finite number, 0 or more",
            found=brief(value),
            remedy="5.0 is Wan2.1's default; 1.0 switches guidance off",
        )


def check_shift(value: float | None) -> None:
    """Refuse a flow shift that is none.

    Raises:
        RequestError: it is neither None nor a finite number above 0.
    """
    if value is not None and (not _is_finite(value) or value <= 0):
        raise RequestError(
            "illegal shift",
            expected="a finite number above 0",
            found=brief(value),
            remedy="The official values are 5.0 at 720p and 3.0 at 480p",
        )


def _check_seed(value: int | None) -> None:
    if value is None:
        return
    _check_whole("seed", value)
    if not 0 <= value <= MAX_SEED:
        # torch's CPU generator (mt19937) uses the low 32 bits only
        raise RequestError(
            "seed out of range",
            expected=f"0 to {MAX_SEED}",
            found=brief(value),
            remedy=f"{value & MAX_SEED} gives the same noise",
        )
