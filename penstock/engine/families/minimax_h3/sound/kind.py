"""The audio VAE, as files hold it: diffusers' folder, ComfyUI's single file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.families.minimax_h3.sound import config as configs
from penstock.engine.family.naming import Naming
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.keys import ComponentSource
from penstock.engine.model.component import Component, component_of

Shapes = dict[str, tuple[int, ...]]

_NEVER = ("encoder.", "pre_block.", "mean_proj.", "logs_proj.", "latents_mean", "latents_std")
"""Of the half that encodes: no sound is given, so nothing of it is read."""

_FILTER = (1, 1, 12)

NAMINGS = (
    Naming(
        "audio_vae", "diffusers",
        marks=("dec_in_proj.", "decoder.conv_pre.weight_g", "decoder.resblocks.0."),
        ignored=_NEVER,
    ),
    Naming(
        "audio_vae", "ComfyUI",
        marks=("dec_in_proj.", "decoder.conv_pre.weight", "decoder.resblocks.0."),
        ignored=_NEVER, config=MappingProxyType({"folded": True}),
    ),
)  # fmt: skip
"""Source of ComfyUI's: its ``comfy/ldm/minimax/audio_vae.py``, which folds lengths into weights."""


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Return every tensor that is read."""
    known = {**configs.AUDIO, **config}
    width, channels = known["latent_dim"], known["latent_channels"]
    found: Shapes = {"dec_in_proj.weight": (width, channels, 1), "dec_in_proj.bias": (width,)}
    return found | {f"decoder.{k}": v for k, v in _decoder(known).items()}


def _conv(name: str, known: Mapping[str, Any], shape: tuple[int, ...], bias: int) -> Shapes:
    found: Shapes = {f"{name}.bias": (bias,)} if bias else {}
    if known["folded"]:
        return found | {f"{name}.weight": shape}
    return found | {f"{name}.weight_g": (shape[0], 1, 1), f"{name}.weight_v": shape}


def _activation(name: str, width: int) -> Shapes:
    return {
        f"{name}.act.alpha": (width,),
        f"{name}.act.beta": (width,),
        f"{name}.upsample.filter": _FILTER,
        f"{name}.downsample.lowpass.filter": _FILTER,
    }


def _decoder(known: Mapping[str, Any]) -> Shapes:
    width = known["decoder_dim"]
    found = _conv("conv_pre", known, (width, known["latent_dim"], 7), width)
    kinds = list(zip(known["resblock_kernel_sizes"], known["resblock_dilation_sizes"], strict=True))
    for number, kernel in enumerate(known["decoder_kernel_sizes"]):
        found |= _conv(f"ups.{number}.0", known, (width, width // 2, kernel), width // 2)
        width //= 2
        for place, (size, dilations) in enumerate(kinds):
            name = f"resblocks.{number * len(kinds) + place}"
            for index in range(len(dilations)):
                for convs in ("convs1", "convs2"):
                    shape = (width, width, size)
                    found |= _conv(f"{name}.{convs}.{index}", known, shape, width)
                for half in (0, 1):
                    found |= _activation(f"{name}.activations.{2 * index + half}", width)
    found |= _activation("activation_post", width)
    return found | _conv("conv_post", known, (1, width, 7), 0)


AUDIO = ComponentKind(
    name="audio_vae",
    made_by=("diffusers", "AutoencoderKLMiniMaxH3Audio"),
    namings=NAMINGS,
    check=configs.check,
    derive=configs.derive,
    shapes=shapes,
    title=configs.title,
    defaults=configs.AUDIO,
    keeps_single=lambda name: True,
)


def components(source: ComponentSource) -> dict[str, Component]:
    """Return the half that decodes."""
    return {AUDIO.name: component_of(source)}


def build(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the network on the meta device."""
    from penstock.engine.families.minimax_h3.sound import modules

    return modules.build(config)
