"""The video VAE, as files hold it: diffusers' folder, ComfyUI's single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

from penstock.engine.families.minimax_h3.video_vae import config as configs
from penstock.engine.family.naming import Naming
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.keys import ComponentSource
from penstock.engine.model.component import Component, component_of

Shapes = dict[str, tuple[int, ...]]

BLOCK = "decoder.transformer_blocks."
_SINGLE = frozenset(
    {"encoder", "quant_conv", "norm1", "norm2", "norm_out", "scale1", "scale2"}
)  # fmt: skip
"""Parts of a name whose parameters stay in fp32. Source: diffusers' `AutoencoderKLMiniMaxH3`."""

_LEVELS, _RESNETS = 16, 16
_OURS = {
    "norm1": "norm1", "norm2": "norm2", "attn.to_qkv": "attn.to_qkv", "scale1": "scale1",
    "scale2": "scale2", "attn.to_out": "attn.to_out.0", "ff.w1": "ff.net.0.proj",
    "ff.w2": "ff.net.2",
}  # fmt: skip


def _outside() -> dict[str, str]:
    table = {
        f"encoder.{name}": f"encoder.{name}" for name in ("conv_in", "norm_out", "conv_out")
    } | {
        "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv",
        "decoder.x_embedder": "decoder.proj_in", "decoder.norm_out": "decoder.norm_out",
        "decoder.proj_out": "decoder.proj_out",
        "decoder.register_tokens": "decoder.register_tokens",
    }  # fmt: skip
    for level in range(_LEVELS):
        old, new = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        table[f"{old}.downsample.conv"] = f"{new}.downsamplers.0.conv"
        for number in range(_RESNETS):
            block, resnet = f"{old}.block.{number}", f"{new}.resnets.{number}"
            table |= {
                f"{block}.{name}": f"{resnet}.{name}"
                for name in ("norm1", "norm2", "conv1", "conv2")
            }
            table[f"{block}.nin_shortcut"] = f"{resnet}.conv_shortcut"
    return table


NAMINGS = (
    Naming(
        "vae", "diffusers",
        marks=("decoder.proj_in.", f"{BLOCK}0.attn.to_q.", "encoder.down_blocks."),
    ),
    Naming(
        "vae", "ComfyUI",
        marks=("decoder.x_embedder.", f"{BLOCK}0.attn.to_qkv.", "encoder.down.0."),
        block=BLOCK, target=BLOCK, inside=_OURS, outside=_outside(),
        ignored=("latents_mean", "latents_std", "decoder.mask_token", "pixel_mean", "pixel_std"),
        config=MappingProxyType({"fused": True}),
    ),
)  # fmt: skip
"""Source of ComfyUI's: its ``comfy/ldm/minimax/vae.py``."""


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out: int, into: int, side: int) -> Shapes:
    return {f"{name}.weight": (out, into, side, side, side), f"{name}.bias": (out,)}


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Return every tensor that a config demands."""
    known = {**configs.VAE, **config}
    found = _prefixed("encoder.", encoder_shapes(known)) | rest_shapes(known)
    block = block_shapes(known)
    for index in range(known["decoder_num_layers"]):
        found |= _prefixed(f"{BLOCK}{index}.", block)
    return found


def encoder_shapes(known: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the CNN that encodes."""
    widths, latent = known["block_out_channels"], known["latent_channels"]
    found = _conv("conv_in", widths[0], known["in_channels"], 3)
    into = widths[0]
    factors = zip(
        known["temporal_downsample_factors"], known["spatial_downsample_factors"], strict=True
    )
    for level, (out, each) in enumerate(zip(widths, factors, strict=True)):
        for number in range(known["layers_per_block"]):
            name = f"down_blocks.{level}.resnets.{number}"
            found |= _norm(f"{name}.norm1", into) | _conv(f"{name}.conv1", out, into, 3)
            found |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out, 3)
            if into != out:
                found |= _conv(f"{name}.conv_shortcut", out, into, 1)
            into = out
        if prod(each) > 1:
            found |= _conv(f"down_blocks.{level}.downsamplers.0.conv", out, out, 3)
    return found | _norm("norm_out", into) | _conv("conv_out", 2 * latent, into, 3)


def rest_shapes(known: Mapping[str, Any]) -> Shapes:
    """Return the shapes of what is neither in the CNN nor in the decoder's blocks."""
    latent, width = known["latent_channels"], width_of(known)
    volume = (
        prod(known["temporal_downsample_factors"]) * prod(known["spatial_downsample_factors"]) ** 2
    )
    found = _conv("quant_conv", 2 * latent, 2 * latent, 1)
    found |= _conv("post_quant_conv", latent, latent, 1)
    found |= _linear("decoder.proj_in", width, latent)
    found |= {"decoder.register_tokens": (1, known["decoder_num_register_tokens"], width)}
    found |= _norm("decoder.norm_out", width)
    return found | _linear("decoder.proj_out", known["out_channels"] * volume, width)


def block_shapes(known: Mapping[str, Any]) -> Shapes:
    """Return the shapes of one of the decoder's blocks."""
    width, found = width_of(known), Shapes()
    if known["fused"]:
        found |= _linear("attn.to_qkv", 3 * width, width)
    else:
        for name in "qkv":
            found |= _linear(f"attn.to_{name}", width, width)
    found |= _linear("attn.to_out.0", width, width)
    inner = known["decoder_ffn_mult"] * width
    found |= _linear("ff.net.0.proj", 2 * inner, width) | _linear("ff.net.2", width, inner)
    single = ("norm1.weight", "norm2.weight", "scale1", "scale2")
    return found | dict.fromkeys(single, (width,))


def width_of(known: Mapping[str, Any]) -> int:
    """Return the width of the decoder's states."""
    return int(known["decoder_num_attention_heads"] * known["decoder_attention_head_dim"])


def keeps_single(name: str) -> bool:
    """Return whether a parameter is in fp32 whatever the VAE computes in."""
    return not _SINGLE.isdisjoint(name.split("."))


def _run(name: str) -> str:
    return "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"


VAE = ComponentKind(
    name="vae",
    made_by=("diffusers", "AutoencoderKLMiniMaxH3"),
    namings=NAMINGS,
    check=configs.check,
    derive=configs.derive,
    shapes=shapes,
    title=configs.title,
    defaults=configs.VAE,
    blocks=BLOCK,
    count=lambda config: int(config["decoder_num_layers"]),
    run_outside=_run,
    keeps_single=keeps_single,
)

ENCODER, DECODER = "vae_encoder", "vae_decoder"
_HALVES = {
    ENCODER: replace(VAE, name=ENCODER, blocks="", count=lambda config: 0),
    DECODER: replace(VAE, name=DECODER),
}
_OWN = {ENCODER: ("encoder.", "quant_conv."), DECODER: ("decoder.", "post_quant_conv.")}


def components(source: ComponentSource) -> dict[str, Component]:
    """Return the halves, which are never in memory together."""
    return {
        name: component_of(replace(source, kind=half), only=_OWN[name], name=name)
        for name, half in _HALVES.items()
    }


def build(component: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the half called ``component`` on the meta device, and its one block (None: it has
    none)."""
    from penstock.engine.families.minimax_h3.video_vae import modules

    if component == ENCODER:
        return modules.build_encoder(config)
    return modules.build_decoder(config)
