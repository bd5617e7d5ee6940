"""The networks of Wan, as files hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from penstock.engine.families.wan import config as configs
from penstock.engine.families.wan import structure
from penstock.engine.families.wan.fields import check_config
from penstock.engine.families.wan.keys import NAMINGS
from penstock.engine.family.naming import Naming
from penstock.engine.family.protocol import ComponentKind


def _namings(component: str) -> tuple[Naming, ...]:
    return tuple(each for each in NAMINGS if each.component == component)


def _vae_run(name: str) -> str:
    """Return what is loaded apart: the VAE's halves."""
    return "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"


def _text_run(name: str) -> str:
    """Return what is read apart: the embedding, by rows."""
    return "embedding" if name == "shared.weight" else "rest"


_TRANSFORMER = ComponentKind(
    name="transformer",
    made_by=("diffusers", "WanTransformer3DModel"),
    namings=_namings("transformer"),
    check=partial(check_config, "transformer"),
    derive=configs.derive_transformer,
    shapes=structure.transformer_shapes,
    title=configs.transformer_title,
    defaults=configs.TRANSFORMER,
    blocks="blocks.",
    count=lambda config: int(config["num_layers"]),
    leaves_stream=structure.is_cross_kv,
    is_packed=True,
)

KINDS: Mapping[str, ComponentKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            _TRANSFORMER,
            ComponentKind(
                name="text_encoder",
                made_by=("transformers", "UMT5EncoderModel"),
                model_type="umt5",
                namings=_namings("text_encoder"),
                check=partial(check_config, "text_encoder"),
                derive=configs.derive_text,
                shapes=structure.text_shapes,
                title=configs.text_title,
                defaults=configs.TEXT,
                blocks="encoder.block.",
                count=lambda config: int(config["num_layers"]),
                run_outside=_text_run,
            ),
            ComponentKind(
                name="vae",
                made_by=("diffusers", "AutoencoderKLWan"),
                namings=_namings("vae"),
                check=partial(check_config, "vae"),
                derive=configs.derive_vae,
                shapes=structure.vae_shapes,
                title=configs.vae_title,
                defaults=configs.VAE,
                run_outside=_vae_run,
            ),
            ComponentKind(
                name="image_encoder",
                made_by=("transformers", "CLIPVisionModel"),
                model_type="clip_vision_model",
                namings=_namings("image_encoder"),
                check=partial(check_config, "image_encoder"),
                derive=configs.derive_image,
                shapes=structure.image_shapes,
                title=configs.image_title,
                defaults=configs.IMAGE,
                blocks="encoder.layers.",
                count=lambda config: structure.layers_needed(config["num_hidden_layers"]),
            ),
            # After the first, so that a file by itself is called a transformer
            replace(_TRANSFORMER, name="transformer_2"),
        )
    }
)
