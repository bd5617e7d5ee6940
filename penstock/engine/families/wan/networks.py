"""The networks of a model without weights: modules on the meta device, each with one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.engine.families.wan import modules
from penstock.engine.families.wan.fields import known


def build(component: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the network of ``component`` under ``config``, and its one block (None: it has
    none)."""
    makers: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
        "transformer": _transformer,
        "transformer_2": _transformer,
        "text_encoder": _text,
        "image_encoder": _image,
        "vae": _vae,
    }
    module, block = makers[component](known(component, config))
    return module.eval().requires_grad_(False), block


def _transformer(config: dict[str, Any]) -> tuple[Any, Any]:
    module = modules.WanTransformer3DModel(**(config | {"num_layers": 1}))
    return module, module.blocks[0]


def _text(config: dict[str, Any]) -> tuple[Any, Any]:
    module = modules.UMT5EncoderModel(**(config | {"num_layers": 1}))
    return module, module.encoder.block[0]


def _image(config: dict[str, Any]) -> tuple[Any, Any]:
    module = modules.CLIPVisionModel(**(config | {"num_hidden_layers": 1}))
    return module, module.encoder.layers[0]


def _vae(config: dict[str, Any]) -> tuple[Any, Any]:
    return modules.AutoencoderKLWan(**config), None
