"""What a client may ask of a video: the dialect's fields by their names, and ours beside them.

The dialect is what vLLM-Omni and SGLang speak at ``/v1/videos``; docs/server.md has both in
a table. A form says everything as text, so that numbers come as their digits and lists as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from penstock.engine.request.settings import Settings
from penstock.errors import RequestError, UsageError

IGNORED = frozenset({"user", "quality", "generator_device", "output_format", "max_sequence_length"})
"""Fields of the dialect that change nothing here, whatever they say."""

NEUTRAL: tuple[Any, ...] = (None, "", False, "false", "False", "null", [], {})
"""What a field that is not known here may say all the same: its own default elsewhere."""

_LONGEST_PROMPT = 20_000
_MOST_LORAS = 8


def _parsed(value: Any) -> Any:
    """Return a list or an object that a form has as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _gap(value: Any) -> Any:
    """Leave out a form's empty fields: they say nothing."""
    return None if value == "" else value


Gap = BeforeValidator(_gap)
Whole = Annotated[int | None, Gap]
Number = Annotated[Annotated[float, Field(allow_inf_nan=False)] | None, Gap]
Flag = Annotated[bool | None, Gap]
Word = Annotated[str | None, Gap]


class LoraUse(BaseModel):
    """A LoRA by its name in the server's folders."""

    model_config = ConfigDict(extra="forbid")

    name: str
    scale: float = 1.0


_LORA = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "array"}, {"type": "null"}]}
_PICTURE = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}
Loras = Annotated[
    str | LoraUse | list[str | LoraUse] | None,
    BeforeValidator(_parsed),
    Gap,
    WithJsonSchema(_LORA),
]
Sent = Annotated[Any, BeforeValidator(_parsed), WithJsonSchema(_PICTURE)]
Text = Annotated[str, Field(max_length=_LONGEST_PROMPT)]


class PlanFields(BaseModel):
    """What a plan depends on, and what a video is asked for with."""

    model_config = ConfigDict(extra="allow")

    prompt: Text = Field("", description="What should happen.")
    model: Word = Field(None, description="A name of /v1/models; the first one where it is absent.")
    size: Word = Field(None, description='Pixels, such as "832x480".')
    width: Whole = Field(None, description="With height: instead of size.")
    height: Whole = Field(None, description="With width: instead of size.")
    seconds: Number = Field(None, description="Length; the nearest that the model can make.")
    num_frames: Whole = Field(None, description="Length in frames, 4n+1; wins over seconds.")
    fps: Number = Field(None, description="Frames a second of the file.")
    num_inference_steps: Whole = Field(None, description="Denoising steps.")
    guidance_scale: Number = Field(None, description="Guidance; 1 is off.")
    guidance_scale_2: Number = Field(
        None, description="Guidance of the second transformer (little noise), of models of two."
    )
    flow_shift: Number = Field(None, description="Flow shift of the noise levels.")
    negative_prompt: Text | None = Field(None, description="What to avoid.")
    seed: Whole = Field(None, description="0 to 2**32-1; drawn where it is absent or -1.")
    lora: Loras = Field(None, description='Names of /v1/loras: "name", "name:0.8", {name, scale}.')
    n: Whole = Field(None, description="1: a request is one video.")
    sampler: Word = Field(None, description="unipc, dpm++, euler or lcm.")
    distilled: Flag = Field(None, description="For models distilled to four steps.")
    fit: Word = Field(None, description="A picture of another aspect: crop, pad or stretch.")
    nag_scale: Number = Field(None, description="Normalized attention guidance.")
    cfg_interval: Word = Field(
        None, description='Guidance only at noise levels from A to B of 0 to 1: "0.3,0.95".'
    )
    window: Whole = Field(None, description="Frames of a long video's windows; 0: all at once.")
    overlap: Whole = Field(None, description="Frames that two windows have in common.")
    cache: Word = Field(None, description="Skipped steps: off, budget, budget:T or plan:N.")

    @property
    def settings(self) -> dict[str, Any]:
        """As the engine's `Settings` has them, with gaps: those of the dialect by their names here,
        all others under their own.

        Raises:
            RequestError: fields that say different things, or one that is not known.
        """
        self._check_known()
        if self.n not in (None, 1):
            raise RequestError("a request is one video", expected="n of 1", found=str(self.n))
        low, high = self.guidance_scale, None
        if self.guidance_scale_2 is not None:
            if low is None:
                raise RequestError(
                    "guidance_scale_2 needs guidance_scale",
                    expected="guidance_scale, of the first transformer, with it",
                    found="none",
                )
            low, high = self.guidance_scale_2, low
        told = {
            "size": self._size(),
            "frames": self.num_frames,
            "fps": _plain(self.fps),
            "steps": self.num_inference_steps,
            "guidance_scale": low,
            "guidance_high": high,
            "shift": self.flow_shift,
            "distilled": bool(self.distilled),
        }
        ours = [each.name for each in fields(Settings) if each.name in PlanFields.model_fields]
        return {name: getattr(self, name) for name in ours} | told

    def _check_known(self) -> None:
        said = {
            name: value
            for name, value in (self.model_extra or {}).items()
            if name not in IGNORED and value not in NEUTRAL
        }
        if said:
            raise RequestError(
                "this server does not support these fields",
                expected="the fields of its OpenAPI page (/docs)",
                found=", ".join(sorted(said))[:200],
                remedy="Leave it out",
            )

    def _size(self) -> str | None:
        if (self.width is None) != (self.height is None):
            raise RequestError(
                "width and height must be given together",
                expected="width and height",
                found="one of them",
            )
        if self.width is None:
            return self.size
        both = f"{self.width}x{self.height}"
        if self.size not in (None, both):
            raise RequestError(
                "size cannot be combined with width and height",
                expected="one",
                found=f"{self.size} and {both}"[:80],
            )
        return both

    @property
    def uses(self) -> list[LoraUse]:
        """The LoRAs, by name.

        Raises:
            RequestError: too many, or a strength that is no number.
        """
        given = self.lora if isinstance(self.lora, list) else [self.lora]
        found = [_use(each) if isinstance(each, str) else each for each in given if each]
        if len(found) > _MOST_LORAS:
            raise RequestError(
                "too many LoRAs", expected=f"{_MOST_LORAS} at most", found=str(len(found))
            )
        return [each for each in found if each is not None]


class VideoFields(PlanFields):
    """A video that shall be made."""

    prompt: Annotated[Text, Field(min_length=1)]
    input_reference: Sent = Field(
        None,
        description="The picture to start from: a file of a form, base64, a data: URL, or "
        "{image_url}; http(s) addresses only where the server was started with --allow-urls.",
    )
    last_image: Sent = Field(
        None, description="The picture to end with, likewise, where the model takes one."
    )
    image_reference: Sent = Field(None, description="As input_reference.")
    reference_url: Word = Field(None, description="As input_reference.")
    continue_from: Word = Field(None, description="The id of a finished video to go on from.")
    preview_every: Annotated[Annotated[int, Field(ge=1)] | None, Gap] = Field(
        None, description="Steps from one preview to the next (1)."
    )


def read_fields(kind: type[PlanFields], given: Mapping[str, Any]) -> PlanFields:
    """Return the fields from a form or a JSON object; what is under "extra_body" counts as said
    beside it.

    Raises:
        RequestError: one has no value of its kind; names it.
    """
    extra = _parsed(given.get("extra_body"))
    values = {name: value for name, value in given.items() if name != "extra_body"}
    params = _parsed(values.pop("video_params", None))
    for more in (params, extra):
        if isinstance(more, Mapping):
            values |= {name: value for name, value in more.items() if values.get(name) is None}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "the request"
        raise IllegalField(name, str(first["msg"])) from error


class IllegalField(RequestError):
    """A field has no value of its kind.

    Args:
        name: of the field.
        why: what is expected.
    """

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        super().__init__(f"{name} is illegal", expected=why[:200])


def _use(text: str) -> LoraUse:
    name, colon, scale = text.rpartition(":")
    if not colon or not name:
        return LoraUse(name=text)
    try:
        return LoraUse(name=name, scale=float(scale))
    except ValueError as error:
        raise UsageError("not a LoRA", expected="NAME or NAME:STRENGTH", found=text[:80]) from error


def _plain(number: float | None) -> float | int | None:
    return int(number) if number is not None and number == int(number) else number
