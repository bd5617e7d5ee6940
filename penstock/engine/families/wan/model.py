"""A model of Wan: its networks opened from their files, and what the planner knows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.spec import ImageSpec, TextSpec, TransformerSpec, VaeSpec
from penstock.engine.families.wan.structure import is_cross_kv
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import ModelSource
from penstock.engine.lora.place import PlacedLoras, lora_spec
from penstock.engine.model.component import Component, component_of
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.grid import Grid
from penstock.profiles.manifest import VideoShape
from penstock.quant.paths import Computing

TRANSFORMER, TEXT, IMAGE = "transformer", "text_encoder", "image_encoder"
SECOND = "transformer_2"
ENCODER, DECODER = "vae encoder", "vae decoder"


class WanModel(ModelFiles):
    """A model of Wan, opened by its headers alone."""

    manifest: WanManifest

    @property
    def transformer(self) -> Component:
        """The denoiser."""
        return self.parts[TRANSFORMER]

    @property
    def second(self) -> Component | None:
        """The denoiser for little noise, where the first one is for much; None: there is none."""
        return self.parts.get(SECOND)

    @property
    def text(self) -> Component:
        """UMT5's encoder."""
        return self.parts[TEXT]

    @property
    def vae_encoder(self) -> Component:
        """Pixels to latents."""
        return self.parts[ENCODER]

    @property
    def vae_decoder(self) -> Component:
        """Latents to pixels."""
        return self.parts[DECODER]

    @property
    def image(self) -> Component | None:
        """CLIP's vision model; None for a text-to-video model."""
        return self.parts.get(IMAGE)

    @property
    def grid(self) -> Grid:
        """The sizes that the model can represent."""
        spec, config = self.manifest, self.transformer.config
        return Grid(
            side=spec.vae.spatial_factor * max(spec.transformer.patch_size[1:]),
            temporal=spec.vae.temporal_factor,
            positions=config["rope_max_seq_len"],
        )

    def latent_shape(self, shape: VideoShape) -> tuple[int, ...]:
        """As `ModelFiles.latent_shape`."""
        vae = self.manifest.vae
        return (1, vae.z_dim, *shape.latent(vae))

    def kept_bytes(self, shape: VideoShape) -> int:
        """Return the prompt states, image states and the condition."""
        spec = self.manifest
        condition = 4 * spec.transformer.in_channels * math.prod(shape.latent(spec.vae))
        texts = 2 * TEXT_TOKENS * spec.text.d_model * spec.text.weights.itemsize
        image = 0 if spec.image is None else 4 * spec.image_tokens * spec.image.hidden_size
        return condition + texts + image


class _HasModel(Protocol):
    @property
    def model(self) -> ModelFiles:
        """A model of any family."""


def model_of(owner: _HasModel) -> WanModel:
    """Return the model that a stage or a desk of this family works with."""
    assert isinstance(owner.model, WanModel)
    return owner.model


def components(source: ModelSource, loras: PlacedLoras) -> dict[str, Component]:
    """Return all networks by their names in plans, the transformer first.

    Raises:
        CheckpointError: a model that is like Wan2.1 and is not run.
    """
    vae = source.parts["vae"]
    parts = {
        TRANSFORMER: streamed(source.streamed, loras),
        TEXT: component_of(source.parts[TEXT]),
        ENCODER: component_of(vae, only=("encoder.", "quant_conv."), name=ENCODER),
        DECODER: component_of(vae, only=("decoder.", "post_quant_conv."), name=DECODER),
    }
    if SECOND in source.parts:
        assert loras.second is not None
        parts[SECOND] = streamed(source.parts[SECOND], loras.second)
    if IMAGE in source.parts:
        parts[IMAGE] = component_of(source.parts[IMAGE])
    return parts


def streamed(source: ComponentSource, loras: PlacedLoras) -> Component:
    """Return the transformer, with LoRAs beside its weights."""
    return component_of(source, loras=loras)


def manifest_of(
    parts: Mapping[str, Component],
    computing: Computing,
    pipeline: Mapping[str, Any] = MappingProxyType({}),
) -> WanManifest:
    """Return what the planner knows of the networks of a model, computing as ``computing`` says."""
    transformer, text, image = parts[TRANSFORMER], parts[TEXT], parts.get(IMAGE)
    encoder, decoder = parts[ENCODER], parts[DECODER]
    return WanManifest(
        transformer=_transformer_spec(transformer, computing),
        text=_text_spec(text, computing),
        vae=_vae_spec(encoder, decoder, computing.scratch.device_type),
        image=None if image is None else _image_spec(image, computing),
        second=None if SECOND not in parts else _transformer_spec(parts[SECOND], computing),
        boundary=pipeline.get("boundary_ratio"),
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
        pos_embed=config["pos_embed_seq_len"] or 0,
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
        decoder_dim=config["decoder_base_dim"] or 0,
        residual=bool(config["is_residual"]),
        patch=config["patch_size"] or 1,
    )
