"""What Wan2.1 was released with where a request leaves something open: sizes, steps, guidance, flow
shifts, and negative prompts, which are data in the model authors' own words.

Source of the prompts: ``sample_neg_prompt`` of the official configs (github.com/Wan-Video/Wan2.1,
``wan/configs/shared_config.py``; ``wan_i2v_14B.py`` puts the camera-shake term in front). diffusers
has no default of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from penstock.engine.request.generation import AREAS, GenerationRequest

TEXT_TO_VIDEO = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
IMAGE_TO_VIDEO = "镜头晃动，" + TEXT_TO_VIDEO
ENGLISH_SHORT = "blurry, low quality, deformed anatomy, stuttering, flickering, sudden cuts"


@dataclass(frozen=True)
class Release:
    """What a model was released with, where that is not as the first ones of Wan2.1 were.

    Attributes:
        values: of a request.
        shift: flow shift at every size.
    """

    values: Mapping[str, Any]
    shift: float


RELEASES: Mapping[str, Release] = MappingProxyType(
    {
        "flf2v": Release(MappingProxyType({"steps": 50, "guidance_scale": 5.0}), 16.0),
        "t2v-a14b": Release(
            MappingProxyType({"steps": 40, "guidance_scale": 3.0, "guidance_high": 4.0}), 12.0
        ),
        "i2v-a14b": Release(MappingProxyType({"steps": 40, "guidance_scale": 3.5}), 5.0),
        "ti2v-5b": Release(
            MappingProxyType({"width": 1280, "height": 704, "frames": 121, "fps": 24, "steps": 50}),
            5.0,
        ),
    }
)
"""Sources: Wan2.1's ``generate.py``, Wan2.2's ``wan/configs``."""

BOUNDARIES: Mapping[bool, float] = MappingProxyType({False: 0.875, True: 0.9})
"""Of all timesteps, from where on Wan2.2's transformer for much noise computes: of a model of text
alone, and of one that takes a picture. Source: its ``wan/configs``."""

DIM_1_3B = 1536
"""Of the hidden states of the 1.3B transformer, which has settings of its own."""


def request_defaults(*, image_to_video: bool, dim: int, release: str = "") -> dict[str, Any]:
    """Return the official size, steps and guidance; the flow shift is `flow_shift`.

    Source: Wan2.1's ``generate.py``, and its README for the 1.3B model.

    Args:
        image_to_video: whether the model takes a picture.
        dim: width of the transformer's hidden states.
        release: a key of `RELEASES`; "" for the first models.
    """
    found: dict[str, Any] = {"width": 1280, "height": 720, "guidance_scale": 5.0}
    if release:
        return found | dict(RELEASES[release].values)
    found["steps"] = 40 if image_to_video else 50
    if _is_small(image_to_video, dim):
        found |= {"width": 832, "height": 480, "guidance_scale": 6.0}
    return found


def flow_shift(
    width: int,
    height: int,
    asked: float | None,
    *,
    image_to_video: bool = True,
    dim: int = 0,
    release: str = "",
) -> float:
    """Return ``asked``, or the official one: from a picture 3.0 up to the area of 480p and 5.0
    above it; from text alone 5.0 at every size, or 8.0 for the 1.3B model.

    Args:
        width, height: of the video.
        asked: the request's own.
        image_to_video: whether the model takes a picture.
        dim: width of the transformer's hidden states.
        release: a key of `RELEASES`; "" for the first models.
    """
    if asked is not None:
        return float(asked)
    if release:
        return RELEASES[release].shift
    if image_to_video:
        return 3.0 if width * height <= AREAS["480p"] else 5.0
    return 8.0 if _is_small(image_to_video, dim) else 5.0


def _is_small(image_to_video: bool, dim: int) -> bool:
    return not image_to_video and dim == DIM_1_3B


def negative_prompt(request: GenerationRequest) -> str:
    """Return the request's own, or the official one of the task."""
    if request.negative_prompt is not None:
        return request.negative_prompt
    return TEXT_TO_VIDEO if request.image is None else IMAGE_TO_VIDEO
