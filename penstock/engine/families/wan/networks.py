"""The networks of a model without weights: the classes of diffusers and transformers on the meta
device, each with one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.engine.families.wan.fields import known
from penstock.engine.model.binding import skeleton


def build(component: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The network of ``component`` under ``config``, and its one block (None: it has none)."""
    makers: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
        "transformer": _transformer,
        "transformer_2": _transformer,
        "text_encoder": _text,
        "image_encoder": _image,
        "vae": _vae,
    }
    return makers[component](known(component, config))


def _transformer(config: dict[str, Any]) -> tuple[Any, Any]:
    from diffusers import WanTransformer3DModel

    module = skeleton(WanTransformer3DModel, config | {"num_layers": 1})
    return module, module.blocks[0]


def _text(config: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import UMT5Config, UMT5EncoderModel

    module = skeleton(UMT5EncoderModel, UMT5Config(**(config | {"num_layers": 1})))
    return module, module.encoder.block[0]


def _image(config: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = skeleton(CLIPVisionModel, CLIPVisionConfig(**(config | {"num_hidden_layers": 1})))
    module = getattr(module, "vision_model", module)  # transformers 4 wraps what 5 has bare
    return module, module.encoder.layers[0]


def _vae(config: dict[str, Any]) -> tuple[Any, Any]:
    from diffusers import AutoencoderKLWan

    return skeleton(AutoencoderKLWan, config), None
