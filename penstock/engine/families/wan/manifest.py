"""Wan as the planner takes it, and how its files become that: plain numbers and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from penstock.engine.families.wan import plan
from penstock.engine.families.wan.spec import ImageSpec, TextSpec, TransformerSpec, VaeSpec, WanSpec
from penstock.engine.families.wan.structure import is_cross_kv
from penstock.engine.families.wan.terms import WanCase
from penstock.engine.lora.place import lora_spec
from penstock.profiles.manifest import Prefetch, Storage, VideoShape
from penstock.profiles.phases import Step
from penstock.quant.paths import Computing

if TYPE_CHECKING:
    from penstock.engine.model.files import Component


_FRAMES = (81, 65, 49, 33, 17)
_AREA_480P = (832, 480)


@dataclass(frozen=True)
class WanManifest(WanSpec):
    """A model of Wan as the planner takes it (`penstock.profiles.manifest.Manifest`)."""

    @property
    def storage(self) -> Storage:
        """As `penstock.profiles.manifest.Manifest`: of the transformer's blocks."""
        return self.transformer.storage

    @property
    def prefetch(self) -> Prefetch:
        """As `penstock.profiles.manifest.Manifest`."""
        return Prefetch(stream="denoise", weights="decode")

    def steps(self, case: WanCase) -> Iterator[Step]:
        """As `penstock.profiles.manifest.Manifest`."""
        return plan.steps(case)

    def smaller_shapes(self, shape: VideoShape) -> Iterator[VideoShape]:
        """Fewer frames first, then 480p, each with fewer tokens than ``shape``."""
        low = _AREA_480P if shape.width >= shape.height else _AREA_480P[::-1]
        for width, height in ((shape.width, shape.height), low):
            for frames in (shape.frames, *_FRAMES):
                fewer = frames <= shape.frames and width * height <= shape.width * shape.height
                if fewer and (width, height, frames) != (shape.width, shape.height, shape.frames):
                    yield VideoShape(width, height, frames)

    def undecided(self) -> WanManifest:
        """As `penstock.profiles.manifest.Manifest`."""
        spec = self.transformer
        context = spec.context_storage
        return replace(
            self,
            transformer=replace(
                spec,
                storage=replace(spec.storage, path=None),
                context_storage=None if context is None else replace(context, path=None),
            ),
        )


def manifest_of(
    transformer: Component,
    text: Component,
    encoder: Component,
    decoder: Component,
    image: Component | None,
    computing: Computing,
) -> WanManifest:
    """What the planner knows of the networks of a model, computing as ``computing`` says."""
    return WanManifest(
        transformer=_transformer_spec(transformer, computing),
        text=_text_spec(text, computing),
        vae=_vae_spec(encoder, decoder, computing.scratch.device_type),
        image=None if image is None else _image_spec(image, computing),
    )


def _transformer_spec(component: Component, computing: Computing) -> TransformerSpec:
    config = component.config
    return TransformerSpec(
        weights=component.weights(computing.scratch.device_type),
        cross_block_bytes=tuple(layout.nbytes for layout in component.cross),
        num_layers=len(component.blocks),
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        patch_size=tuple(config["patch_size"]),
        image_dim=config["image_dim"],
        storage=component.storage(computing, lambda name: not is_cross_kv(name)),
        context_storage=component.storage(computing, is_cross_kv),
        lora=lora_spec(component.loras, component.blocks),
    )


def _text_spec(component: Component, computing: Computing) -> TextSpec:
    config = component.config
    return TextSpec(
        weights=component.weights(computing.scratch.device_type),
        d_model=config["d_model"],
        d_kv=config["d_kv"],
        d_ff=config["d_ff"],
        num_layers=len(component.blocks),
        num_heads=config["num_heads"],
        storage=component.storage(computing),
    )


def _image_spec(component: Component, computing: Computing) -> ImageSpec:
    config = component.config
    return ImageSpec(
        weights=component.weights(computing.scratch.device_type),
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=len(component.blocks),
        num_attention_heads=config["num_attention_heads"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        storage=component.storage(computing),
    )


def _vae_spec(encoder: Component, decoder: Component, device: str) -> VaeSpec:
    config = decoder.config
    return VaeSpec(
        encoder=encoder.weights(device),
        decoder=decoder.weights(device),
        base_dim=config["base_dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
    )
