"""A model of MiniMax-H3: its networks opened from their files, and what the planner knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from penstock.engine.families.minimax_h3 import structure
from penstock.engine.families.minimax_h3.manifest import H3Manifest
from penstock.engine.families.minimax_h3.sizes import GRID, Latents
from penstock.engine.families.minimax_h3.sound import kind as sound
from penstock.engine.families.minimax_h3.sound import spec as sound_spec
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.engine.families.minimax_h3.structure import ENDS, leaves_stream
from penstock.engine.families.minimax_h3.terms import TEXT_TOKENS
from penstock.engine.families.minimax_h3.text import kind as text
from penstock.engine.families.minimax_h3.text import spec as text_spec
from penstock.engine.families.minimax_h3.text.patches import tokens
from penstock.engine.families.minimax_h3.video_vae import kind as video
from penstock.engine.families.minimax_h3.video_vae import spec as video_spec
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import ModelSource
from penstock.engine.lora.place import PlacedLoras, lora_spec
from penstock.engine.model.component import Component, component_of
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.grid import Grid
from penstock.profiles.manifest import VideoShape
from penstock.quant.paths import Computing

TRANSFORMER, ONCE = "transformer", "transformer_once"


class H3Model(ModelFiles):
    """A model of MiniMax-H3, opened by its headers alone."""

    manifest: H3Manifest

    @property
    def transformer(self) -> Component:
        """The denoiser; outside its blocks, what each forward pass needs."""
        return self.parts[TRANSFORMER]

    @property
    def once(self) -> Component:
        """The denoiser again; outside its blocks, what serves once a job."""
        return self.parts[ONCE]

    @property
    def grid(self) -> Grid:
        """The sizes that the model can represent."""
        return GRID

    def sizes(self, shape: VideoShape) -> Latents:
        """Return the sizes of the latents of a video and its sound."""
        spec = self.manifest.transformer
        return Latents.of(shape, spec.in_channels, spec.audio_in_channels)

    def latent_shape(self, shape: VideoShape) -> tuple[int, ...]:
        """As `ModelFiles.latent_shape`: the video's and the sound's, packed."""
        return (1, self.sizes(shape).elements)

    def kept_bytes(self, shape: VideoShape) -> int:
        """Return the prompt states with two pictures in them, their tags, and the pictures'
        latents."""
        sizes, spec = self.sizes(shape), self.manifest.transformer
        rows = TEXT_TOKENS + 2 * tokens(shape.height, shape.width)
        states = rows * (spec.text_dim * spec.weights.itemsize + 8)
        return states + 2 * 4 * sizes.channels * sizes.height * sizes.width


class _HasModel(Protocol):
    @property
    def model(self) -> ModelFiles:
        """A model of any family."""


def model_of(owner: _HasModel) -> H3Model:
    """Return the model that a stage of this family works with."""
    assert isinstance(owner.model, H3Model)
    return owner.model


def components(source: ModelSource, loras: PlacedLoras) -> dict[str, Component]:
    """Return all networks by their names in plans, the transformer first."""
    return {
        TRANSFORMER: streamed(source.streamed, loras),
        ONCE: component_of(source.streamed, only=structure.ONCE, name=ONCE, loras=loras),
        **text.components(source.parts["text_encoder"]),
        **video.components(source.parts["vae"]),
        **sound.components(source.parts["audio_vae"]),
    }


def streamed(source: ComponentSource, loras: PlacedLoras) -> Component:
    """Return the transformer, with LoRAs beside its weights; outside its blocks, what each forward
    pass needs."""
    return component_of(source, only=ENDS, loras=loras)


def manifest_of(
    parts: Mapping[str, Component],
    computing: Computing,
    pipeline: Mapping[str, Any] = MappingProxyType({}),
) -> H3Manifest:
    """Return what the planner knows of the networks of a model, computing as ``computing`` says."""
    return H3Manifest(
        transformer=_spec(parts[TRANSFORMER], parts[ONCE], computing),
        text=text_spec.of(parts, computing),
        vae=video_spec.of(parts, computing),
        audio=sound_spec.of(parts, computing),
    )


def _spec(component: Component, once: Component, computing: Computing) -> PackedSpec:
    config, device = component.config, computing.scratch.device_type
    names = (
        "num_refiner_layers", "num_attention_heads", "attention_head_dim", "hidden_size",
        "ffn_dim", "in_channels", "audio_in_channels", "text_dim", "freq_dim",
        "time_embed_hidden_dim", "time_embed_dim", "rope_freq_dim", "time_table_size",
        "adaln_rank",
    )  # fmt: skip
    return PackedSpec(
        weights=component.weights(device),
        once_bytes=once.weights(device).rest_bytes,
        table_block_bytes=tuple(layout.nbytes for layout in component.cross),
        num_layers=len(component.blocks),
        storage=component.storage(computing, lambda name: not leaves_stream(name)),
        table_storage=component.storage(computing, leaves_stream),
        lora=lora_spec(component.loras, component.blocks),
        **{name: config[name] for name in names},
    )
