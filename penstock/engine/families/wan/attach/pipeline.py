"""diffusers' own Wan pipelines over the parts of an opened model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from penstock.engine.attach.desk import Desk
from penstock.engine.attach.part import Part
from penstock.engine.families.wan.attach.parts import ImagePart, TextPart, TransformerPart
from penstock.engine.families.wan.attach.vae_part import VaePart
from penstock.engine.families.wan.clip import make_image_processor
from penstock.engine.families.wan.fields import known
from penstock.engine.families.wan.model import DECODER, TRANSFORMER
from penstock.engine.model.files import ModelFiles
from penstock.errors import CheckpointError

PARTS: Mapping[str, type[Part]] = MappingProxyType(
    {
        "transformer": TransformerPart,
        "text_encoder": TextPart,
        "vae": VaePart,
        "image_encoder": ImagePart,
    }
)


def pipeline_of(model: ModelFiles, desk: Desk) -> Any:
    """Return diffusers' pipeline of ``model``, its networks replaced by parts.

    Raises:
        CheckpointError: the model's scheduler is none of diffusers.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline

    device = torch.device("cpu")
    parts: dict[str, Any] = {
        name: made(name, desk, _config(name, model), device)
        for name, made in PARTS.items()
        if name != "image_encoder" or model.image_to_video
    }
    parts |= {"tokenizer": model.tokenizer.for_transformers(), "scheduler": _scheduler(model)}
    if not model.image_to_video:
        return WanPipeline(**parts)
    parts["image_processor"] = make_image_processor(model.source.image_processor)
    return WanImageToVideoPipeline(**parts)


def _config(name: str, model: ModelFiles) -> Any:
    """Return the config of a part, as the library that it is from would give it."""
    from diffusers.configuration_utils import FrozenDict
    from transformers import CLIPVisionConfig, UMT5Config

    source = model.source.parts[name]
    if name == "text_encoder":
        return UMT5Config(**known(name, source.config))
    if name == "image_encoder":
        return CLIPVisionConfig(**known(name, source.config))
    skeleton = model.parts[TRANSFORMER if name == TRANSFORMER else DECODER].module
    return FrozenDict({**skeleton.config, **source.config})


def _scheduler(model: ModelFiles) -> Any:
    import diffusers

    name = str(model.source.scheduler.get("_class_name"))
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise CheckpointError(
            "the model's scheduler cannot be used",
            expected="a scheduler of diffusers",
            found=name,
            remedy="Correct scheduler/scheduler_config.json.",
        )
    made: Any = found
    return made.from_config(dict(model.source.scheduler))
