"""A located model made ready to run: skeletons, layouts and bytes of every network.

A network is a skeleton on the meta device (the class and the parameter names of diffusers or
transformers, with a single block), plus the places of its tensors: one layout for all that is not
in a block, and one per block. No weights are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.checked import Packs
from penstock.engine.formats import WeightReader, compute_tag
from penstock.engine.keys import ComponentSource, as_bytes, stored_name
from penstock.engine.locate import ModelSource
from penstock.engine.opening import Opening
from penstock.engine.request import Grid
from penstock.engine.storage import StoredWeight
from penstock.engine.template import Template, Treatment, joined, main_format
from penstock.engine.wan.forward import is_cross_kv
from penstock.engine.wan.structure import BLOCKS
from penstock.engine.weights import skeleton
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import TensorEntry, torch_dtype
from penstock.offload.files import check_unchanged
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import (
    ImageSpec,
    ModelManifest,
    Storage,
    TextSpec,
    TransformerSpec,
    VaeSpec,
    Weights,
)
from penstock.quant.compute import Computing, Scratch

EMBEDDING = "shared.weight"
"""The text encoder's table: its rows are gathered, it is never loaded."""

_CONTEXT = "condition_embedder."
"""Of the transformer's layers outside the blocks, those that only the context phase uses."""


@dataclass(frozen=True)
class Component:
    """One network: its skeletons and the places of its weights.

    Attributes:
        name: for people and reports.
        source: the files it comes from.
        template: the whole network; ours to bind tensors to.
        templates: one a block; blocks that are stored alike share theirs.
        rest: everything outside the blocks.
        blocks: one layout a block.
        cross: the cross-attention K/V projections of each block, which leave the stream (DiT).
        dtype: the type it computes in.
        storage: what computing with its blocks takes besides their bytes.
        context_storage: likewise for ``cross`` and what the context phase uses of ``rest``.
        scratch: the buffer that its quantised layers are decoded into.
        packs: the packs among its files.
    """

    name: str
    source: ComponentSource
    template: Template
    templates: tuple[Template, ...]
    rest: BlockLayout
    blocks: tuple[BlockLayout, ...]
    cross: tuple[BlockLayout, ...]
    dtype: torch.dtype
    storage: Storage
    context_storage: Storage
    scratch: Scratch
    packs: Packs

    @property
    def module(self) -> Any:
        """The skeleton of the whole network, with one (unused) block."""
        return self.template.module

    @property
    def weights(self) -> Weights:
        """The bytes of it, for the planner."""
        return Weights(
            rest_bytes=self.rest.nbytes + self.template.cast_bytes,
            block_bytes=tuple(layout.nbytes for layout in self.blocks),
            itemsize=self.dtype.itemsize,
        )

    def check_unchanged(self) -> None:
        """Raise CheckpointChanged if a file was changed since its header was read."""
        check_unchanged(self.source.raw.stamps)

    def embedding_rows(self, rows: Sequence[int]) -> Tensor:
        """``rows`` of the text encoder's table, in the compute dtype; only they are decoded.

        Raises:
            CheckpointError: a pack's table is damaged, or rows cannot be read alone.
        """
        self.packs.verify("embedding")
        with WeightReader(self.source) as reader:
            found = reader.gather(EMBEDDING, rows, self.dtype)
            reader.check_unchanged()
            return found


@dataclass(frozen=True)
class ModelFiles:
    """A Wan2.1 model, opened by its headers alone."""

    opening: Opening
    source: ModelSource
    transformer: Component
    text: Component
    vae_encoder: Component
    vae_decoder: Component
    image: Component | None
    manifest: ModelManifest

    @property
    def image_to_video(self) -> bool:
        """Whether a conditioning picture is needed (and the model has 36 input channels)."""
        return self.manifest.transformer.in_channels > self.manifest.vae.z_dim

    @property
    def grid(self) -> Grid:
        """The sizes that the model can represent."""
        spec, config = self.manifest, self.transformer.module.config
        return Grid(
            side=spec.vae.spatial_factor * max(spec.transformer.patch_size[1:]),
            temporal=spec.vae.temporal_factor,
            positions=config.rope_max_seq_len,
        )

    @classmethod
    def open(
        cls, source: ModelSource, device: torch.device, opening: Opening | None = None
    ) -> ModelFiles:
        """Describe ``source`` without reading a weight.

        Args:
            device: where it will compute.
            opening: how it was asked for; None: the source's origin, exact.

        Raises:
            CheckpointError: a storage or a model that penstock does not run.
        """
        opening = opening or Opening(source.origin)
        transformer = _open_transformer(source.transformer, device, opening)
        text = _open_text(source.text_encoder, device)
        encoder, decoder = _open_vae(source.vae, device)
        image = None if source.image_encoder is None else _open_image(source.image_encoder, device)
        _check_widths(source)
        return cls(
            opening=opening,
            source=source,
            transformer=transformer,
            text=text,
            vae_encoder=encoder,
            vae_decoder=decoder,
            image=image,
            manifest=_manifest(transformer, text, encoder, decoder, image),
        )

    def components(self) -> tuple[Component, ...]:
        """All networks of the model."""
        parts = (self.transformer, self.text, self.vae_encoder, self.vae_decoder, self.image)
        return tuple(part for part in parts if part is not None)

    def files(self) -> dict[str, Path]:
        """All files that weights and tokens come from, by a name that does not tell where they
        lie."""
        found = {
            f"{part.component}/{path.name}": path
            for part in self.source.components()
            for path in part.raw.stamps
        }
        tokenizer = self.source.tokenizer
        if isinstance(tokenizer, Path):
            inside = sorted(tokenizer.iterdir()) if tokenizer.is_dir() else [tokenizer]
            found |= {f"tokenizer/{path.name}": path for path in inside if path.is_file()}
        return dict(sorted(found.items()))


def _check_widths(source: ModelSource) -> None:
    """Refuse encoders whose states the transformer does not take."""
    wanted = source.transformer.config
    pairs = [(source.text_encoder, "d_model", "text_dim")]
    if source.image_encoder is not None:
        pairs.append((source.image_encoder, "hidden_size", "image_dim"))
    for part, entry, taken in pairs:
        if part.config[entry] != wanted[taken]:
            raise CheckpointError(
                f"{part.raw.path} does not go with the transformer {source.transformer.raw.path}",
                expected=f"states {wanted[taken]} wide",
                found=f"{part.config[entry]} wide ({part.family})",
                remedy="Take transformer and encoders of one model.",
            )


def _open_transformer(source: ComponentSource, device: torch.device, opening: Opening) -> Component:
    from diffusers import WanTransformer3DModel

    config = dict(source.config)
    if config.get("pos_embed_seq_len") is not None:
        raise CheckpointError(
            "first-and-last-frame models are not supported",
            expected="pos_embed_seq_len absent",
            found=str(config["pos_embed_seq_len"]),
        )
    module = skeleton(WanTransformer3DModel, config | {"num_layers": 1})
    parts = _Parts(source, device, module, module.blocks[0], opening, leaves_stream=is_cross_kv)
    return parts.component(config["num_layers"])


def _open_text(source: ComponentSource, device: torch.device) -> Component:
    from transformers import UMT5Config, UMT5EncoderModel

    config = dict(source.config)
    module = skeleton(UMT5EncoderModel, UMT5Config(**(config | {"num_layers": 1})))
    parts = _Parts(source, device, module, module.encoder.block[0])
    return parts.component(config["num_layers"])


def _open_image(source: ComponentSource, device: torch.device) -> Component:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = dict(source.config)
    module = skeleton(CLIPVisionModel, CLIPVisionConfig(**(config | {"num_hidden_layers": 1})))
    # The model is conditioned on hidden_states[-2]: the last layer is never computed.
    parts = _Parts(source, device, module, module.encoder.layers[0])
    return parts.component(config["num_hidden_layers"] - 1)


def _open_vae(source: ComponentSource, device: torch.device) -> tuple[Component, Component]:
    from diffusers import AutoencoderKLWan

    def half(name: str, only: tuple[str, ...]) -> Component:
        module = skeleton(AutoencoderKLWan, dict(source.config))
        return _Parts(source, device, module, None, only=only).component(0, f"vae {name}")

    return half("encoder", ("encoder.", "quant_conv.")), half(
        "decoder", ("decoder.", "post_quant_conv.")
    )


def _computes_as_stored(name: str) -> bool:
    """transformers keeps UMT5's output projections in fp32 where the rest is fp16."""
    return name.endswith("DenseReluDense.wo.weight")


@dataclass(frozen=True)
class _Parts:
    """What a component is made from.

    Attributes:
        module: the skeleton of all of it, with one block.
        block: that block; None: the network has none.
        only: beginnings of the names that count.
        leaves_stream: local names of a block that are a layout of their own.
    """

    source: ComponentSource
    device: torch.device
    module: Any
    block: Any
    opening: Opening = Opening("")
    only: tuple[str, ...] = ("",)
    leaves_stream: Callable[[str], bool] = lambda name: False

    @cached_property
    def dtype(self) -> torch.dtype:
        """To compute in."""
        return torch_dtype(compute_tag(self.source))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.shapes

    @cached_property
    def _computing(self) -> Computing:
        return Computing(Scratch(), self.opening.compute, self.opening.working)

    @cached_property
    def _packs(self) -> Packs:
        return Packs(self.source)

    def component(self, count: int, name: str = "") -> Component:
        """The component with the first ``count`` of its blocks."""
        prefix = BLOCKS[self.source.component][0] if self.block is not None else None
        rest = {
            key: stored
            for key, stored in self.source.weights.items()
            if key.startswith(self.only) and key != EMBEDDING and not _begins(key, prefix)
        }
        root = self._template(self.module, self._treatment(rest, ""))
        prefixes = [f"{prefix}{index}." for index in range(count)]
        local = [self._local(each) for each in prefixes]
        templates = self._block_templates(local, prefixes)
        return Component(
            name=name or self.source.component,
            source=self.source,
            template=root,
            templates=templates,
            rest=self._layout(rest),
            blocks=tuple(self._layout(each, self._stays) for each in local),
            cross=tuple(
                self._layout(each, self.leaves_stream)
                for each in local
                if any(map(self.leaves_stream, each))
            ),
            dtype=self.dtype,
            storage=self._storage(root, templates, context=False),
            context_storage=self._storage(root, templates, context=True),
            scratch=self._computing.scratch,
            packs=self._packs,
        )

    def _local(self, prefix: str) -> dict[str, StoredWeight]:
        weights = self.source.weights
        return {key[len(prefix) :]: w for key, w in weights.items() if key.startswith(prefix)}

    def _stays(self, name: str) -> bool:
        return not self.leaves_stream(name)

    def _treatment(self, weights: Mapping[str, StoredWeight], prefix: str) -> Treatment:
        shapes = {name: self._shapes[prefix + name] for name in weights}
        return Treatment.of(weights, shapes, self.dtype, _computes_as_stored)

    def _template(self, module: Any, treatment: Treatment) -> Template:
        return Template.of(module, treatment, self._computing, self.dtype)

    def _block_templates(
        self, local: Sequence[Mapping[str, StoredWeight]], prefixes: Sequence[str]
    ) -> tuple[Template, ...]:
        made: dict[Any, Template] = {}
        found = []
        for weights, prefix in zip(local, prefixes, strict=True):
            treatment = self._treatment(weights, prefix)
            if treatment.key not in made:
                made[treatment.key] = self._template(copy.deepcopy(self.block), treatment)
            found.append(made[treatment.key])
        return tuple(found)

    def _layout(
        self, weights: Mapping[str, StoredWeight], chosen: Callable[[str], bool] = lambda name: True
    ) -> BlockLayout:
        entries: dict[str, TensorEntry] = {
            stored_name(name, suffix): as_bytes(entry)
            for name, stored in weights.items()
            if chosen(name)
            for suffix, entry in stored.tensors.items()
        }
        return self._packs.checked(BlockLayout.from_entries(entries))

    def _storage(self, root: Template, templates: Sequence[Template], *, context: bool) -> Storage:
        """In the context phase, or in all others."""
        of_block = self.leaves_stream if context else self._stays
        distinct = list({id(each): each for each in templates}.values())
        blocks = [each.storage(self.device, of_block) for each in distinct]
        outside = root.storage(self.device, lambda name: name.startswith(_CONTEXT) == context)
        cast_bytes = max((each.cast_bytes for each in distinct), default=0)
        return joined([*blocks, outside], self._format, cast_bytes)

    @cached_property
    def _format(self) -> str:
        """Of the blocks' matrices, or of all where there are no blocks."""
        prefix = "" if self.block is None else BLOCKS[self.source.component][0]
        weights = self.source.weights
        inside = {name: stored for name, stored in weights.items() if name.startswith(prefix)}
        return main_format(inside, self._shapes)


def _begins(name: str, prefix: str | None) -> bool:
    return prefix is not None and name.startswith(prefix)


def _manifest(
    transformer: Component,
    text: Component,
    encoder: Component,
    decoder: Component,
    image: Component | None,
) -> ModelManifest:
    return ModelManifest(
        transformer=_transformer_spec(transformer),
        text=_text_spec(text),
        vae=_vae_spec(encoder, decoder),
        image=None if image is None else _image_spec(image),
    )


def _transformer_spec(component: Component) -> TransformerSpec:
    config = component.module.config
    return TransformerSpec(
        weights=component.weights,
        cross_block_bytes=tuple(layout.nbytes for layout in component.cross),
        num_layers=len(component.blocks),
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        patch_size=tuple(config.patch_size),
        image_dim=config.image_dim,
        storage=component.storage,
        context_storage=component.context_storage,
    )


def _text_spec(component: Component) -> TextSpec:
    config = component.module.config
    return TextSpec(
        weights=component.weights,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=len(component.blocks),
        num_heads=config.num_heads,
        storage=component.storage,
    )


def _image_spec(component: Component) -> ImageSpec:
    config = component.module.config
    return ImageSpec(
        weights=component.weights,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(component.blocks),
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        storage=component.storage,
    )


def _vae_spec(encoder: Component, decoder: Component) -> VaeSpec:
    config = decoder.module.config
    return VaeSpec(
        encoder=encoder.weights,
        decoder=decoder.weights,
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=tuple(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temporal_downsample=tuple(config.temperal_downsample),
    )
