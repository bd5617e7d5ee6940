"""Opening a model: configs, headers, the layout of every network. No weights are read.

A network is a skeleton on the meta device (the class and the parameter names of diffusers or
transformers, with a single block), plus the places of its tensors: one layout for all that is not
in a block, and one per block. Where the model lies and how its files name and store the weights is
found by `penstock.engine.locate`; from here on all models look alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.checked import Packs
from penstock.engine.component import Adapter, adapters_of, read_table_rows
from penstock.engine.decoding import Matrices, block_format, storage_of
from penstock.engine.formats import compute_tag, linear_formats
from penstock.engine.image import layers_needed
from penstock.engine.keys import ComponentSource
from penstock.engine.locate import Files, ModelSource, locate, open_tokenizer
from penstock.engine.opening import Opening
from penstock.engine.request import Grid
from penstock.engine.specs import manifest_of
from penstock.engine.wan.forward import is_cross_kv
from penstock.engine.weights import bind, skeleton, unbind
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import Checkpoint, TensorEntry, torch_dtype
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import ModelManifest, Storage, Weights
from penstock.quant.compute import Computing, Scratch
from penstock.quant.format import QuantFormat
from penstock.quant.linear import replace_linears

Formats = Mapping[str, QuantFormat]


@dataclass(frozen=True)
class Component:
    """One network: its skeleton and the places of its weights.

    Attributes:
        name: what it is called in plans and reports.
        module: the network on the meta device, with one block; ours to bind tensors to.
        templates: the block module of each block; blocks stored alike share one (empty: no blocks).
        rest: everything outside the blocks.
        blocks: one layout a block.
        cross: the cross-attention K/V projections of each block, which leave the stream (DiT).
        dtype: the type it computes in.
        formats: of the quantised linears of each block.
        adapters: what makes odd tensors fit: first outside the blocks, then block by block.
        source: where it comes from.
        packs: those that hold it; every block of theirs is verified as it is read.
    """

    name: str
    module: Any
    templates: tuple[Any, ...]
    checkpoint: Checkpoint
    rest: BlockLayout
    blocks: tuple[BlockLayout, ...]
    cross: tuple[BlockLayout, ...]
    dtype: torch.dtype
    formats: tuple[Formats, ...]
    adapters: tuple[Adapter, ...]
    source: ComponentSource
    packs: Packs
    _ready: set[int] = field(default_factory=set, repr=False, compare=False)

    def weights(self, device: torch.device) -> Weights:
        """The bytes of it, for the planner: as stored, and what adapting the rest takes besides."""
        return Weights(
            rest_bytes=self.rest.nbytes + self.adapters[0].peak_bytes(device),
            block_bytes=tuple(layout.nbytes for layout in self.blocks),
            itemsize=self.dtype.itemsize,
        )

    def storage(
        self, computing: Computing, part: Callable[[str], bool] = lambda name: True
    ) -> Storage:
        """What the quantised linears of the blocks take besides their bytes, and the block tensors
        that are cast; of those linears whose local name ``part`` holds of."""
        cast = max((a.peak_bytes(computing.scratch.device) for a in self.adapters[1:]), default=0)
        blocks = (self._matrices(index, part) for index in range(len(self.blocks)))
        tag = compute_tag(self.source)
        return storage_of(block_format(self.source), blocks, computing, tag, cast)

    def _matrices(self, index: int, part: Callable[[str], bool]) -> Matrices:
        linears = {
            name: (fmt, self.templates[index].get_submodule(name))
            for name, fmt in self.formats[index].items()
            if part(f"{name}.")
        }
        return [(fmt, (each.out_features, each.in_features)) for fmt, each in linears.values()]

    def install(self, computing: Computing) -> None:
        """Put quantised linears into the block modules where the files store them so."""
        for module, formats in zip(self.templates, self.formats, strict=True):
            if id(module) not in self._ready:
                replace_linears(module, formats, computing, self.dtype)
                self._ready.add(id(module))

    @contextmanager
    def bound(self, tensors: Mapping[str, Tensor], index: int | None = None) -> Iterator[Any]:
        """The block ``index`` (None: the network) with its streamed ``tensors`` bound inside."""
        place = 0 if index is None else index + 1
        module = (self.module, *self.templates)[place]
        bind(module, self.adapters[place](tensors))
        try:
            yield module
        finally:
            unbind(module)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows of a table, in `dtype`, on the CPU; nothing else is kept. A table in a pack is read
        as a whole once, for its checksum.

        Raises:
            CheckpointError: the table is damaged, or no format reads it.
        """
        for entry in self.source.weights[name].tensors.values():
            self.packs.verify(entry)
        return read_table_rows(self.source, self.checkpoint, name, rows, self.dtype)


@dataclass(frozen=True)
class ModelFiles:
    """A Wan2.1 model, wherever its parts lie, opened by its headers alone.

    Attributes:
        opening: how it was asked for.
        source: where its parts were found.
        manifest: what the planner knows of it; `installed` says it for a device.
        scratch: that its quantised linears decode into.
    """

    opening: Opening
    source: ModelSource
    transformer: Component
    text: Component
    vae_encoder: Component
    vae_decoder: Component
    image: Component | None
    manifest: ModelManifest
    scratch: Scratch

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

    @property
    def files(self) -> dict[str, Path]:
        """Every file that a result depends on, by component and name."""
        found: dict[str, Path] = {}
        for part in self.source.components():
            config = part.raw.path / "config.json"
            paths = [*part.raw.stamps, *([config] if config.exists() else [])]
            found |= {f"{part.component}/{path.name}": path for path in paths}
        tokenizer = self.source.tokenizer
        if isinstance(tokenizer, Path):
            inside = tokenizer.iterdir() if tokenizer.is_dir() else [tokenizer]
            found |= {f"tokenizer/{path.name}": path for path in inside if path.is_file()}
        return found

    def tokenizer(self) -> Any:
        """The text encoder's tokenizer.

        Raises:
            CheckpointError: it cannot be read.
        """
        return open_tokenizer(self.source.tokenizer)

    @classmethod
    def open(cls, model: str | Path | None, files: Files | None = None) -> ModelFiles:
        """Describe a model without reading a weight.

        Args:
            model, files: as `penstock.engine.locate.locate` takes them.

        Raises:
            CheckpointError: no Wan2.1 model, or one that penstock does not run.
            HeaderError, PickleRefused, TensorMismatch: a component's files cannot be used.
        """
        source = locate(model, files)
        transformer = _open_transformer(source.transformer)
        text = _open_text(source.text_encoder)
        encoder, decoder = _open_vae(source.vae)
        image = None if source.image_encoder is None else _open_image(source.image_encoder)
        computing = Computing(Scratch(0, "cpu"))
        return cls(
            opening=Opening(None if model is None else str(model), files or Files()),
            source=source,
            transformer=transformer,
            text=text,
            vae_encoder=encoder,
            vae_decoder=decoder,
            image=image,
            manifest=manifest_of(transformer, text, encoder, decoder, image, computing),
            scratch=computing.scratch,
        )

    def installed(self, computing: Computing) -> ModelFiles:
        """This model with its quantised linears computing as ``computing`` says, and the manifest
        that states what they take so. Once a model: the linears stay as they are made."""
        for part in self.components():
            part.install(computing)
        manifest = manifest_of(
            self.transformer, self.text, self.vae_encoder, self.vae_decoder, self.image, computing
        )
        return replace(self, manifest=manifest, scratch=computing.scratch)

    def with_transformer(self, source: ComponentSource) -> ModelFiles:
        """This model with another transformer; to be `installed` before it computes."""
        opened = _open_transformer(source)
        return replace(self, source=replace(self.source, transformer=source), transformer=opened)

    def components(self) -> tuple[Component, ...]:
        """All networks of the model."""
        parts = (self.transformer, self.text, self.vae_encoder, self.vae_decoder, self.image)
        return tuple(part for part in parts if part is not None)

    def close(self) -> None:
        """Close the files."""
        for component in self.components():
            component.checkpoint.close()


def _open_transformer(source: ComponentSource) -> Component:
    from diffusers import WanTransformer3DModel

    if source.config.get("pos_embed_seq_len") is not None:
        raise CheckpointError(
            "first-and-last-frame models are not supported",
            expected="pos_embed_seq_len absent",
            found=str(source.config["pos_embed_seq_len"]),
        )
    module = skeleton(WanTransformer3DModel, dict(source.config) | {"num_layers": 1})
    count = source.config["num_layers"]
    return _component(source, module, module.blocks[0], "blocks.", count, is_cross_kv)


def _open_text(source: ComponentSource) -> Component:
    from transformers import UMT5Config, UMT5EncoderModel

    config = dict(source.config)
    module = skeleton(UMT5EncoderModel, UMT5Config(**(config | {"num_layers": 1})))
    block, count = module.encoder.block[0], config["num_layers"]
    return _component(source, module, block, "encoder.block.", count)


def _open_image(source: ComponentSource) -> Component:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = dict(source.config)
    module = skeleton(CLIPVisionModel, CLIPVisionConfig(**(config | {"num_hidden_layers": 1})))
    block, count = module.encoder.layers[0], config["num_hidden_layers"]
    return _component(source, module, block, "encoder.layers.", layers_needed(count))


def _open_vae(source: ComponentSource) -> tuple[Component, Component]:
    from diffusers import AutoencoderKLWan

    halves = []
    for half, parts in (
        ("encoder", ("encoder.", "quant_conv.")),
        ("decoder", ("decoder.", "post_quant_conv.")),
    ):
        module = skeleton(AutoencoderKLWan, dict(source.config))
        component = _component(source, module, None, only=parts)
        halves.append(replace(component, name=f"vae {half}"))
    return halves[0], halves[1]


def _component(
    source: ComponentSource,
    module: Any,
    block: Any,
    prefix: str = "",
    count: int = 0,
    leaves_stream: Callable[[str], bool] = lambda name: False,
    only: tuple[str, ...] = ("",),
) -> Component:
    entries = source.entries()
    groups = [
        {key: entry for key, entry in entries.items() if _in_rest(key, prefix, only)},
        *(_local(entries, f"{prefix}{index}.") for index in range(count)),
    ]
    formats = _local_formats(linear_formats(source), prefix, count)
    blocks = [_split(group, leaves_stream) for group in groups[1:]]
    packs = Packs.of(source.raw)
    dtype = torch_dtype(compute_tag(source))
    return Component(
        name=source.component,
        module=module,
        templates=_templates(block, formats),
        checkpoint=Checkpoint(source.raw.path, entries, source.raw.stamps, {}),
        rest=packs.checked(BlockLayout.from_entries(groups[0])),
        blocks=tuple(packs.checked(BlockLayout.from_entries(part)) for part, _ in blocks),
        cross=tuple(packs.checked(BlockLayout.from_entries(part)) for _, part in blocks if part),
        dtype=dtype,
        formats=formats,
        adapters=adapters_of(source, prefix, count, only, dtype),
        source=source,
        packs=packs,
    )


def _in_rest(key: str, prefix: str, only: tuple[str, ...]) -> bool:
    """Whether a tensor is loaded with the network itself (the embedding is gathered by rows)."""
    in_block = bool(prefix) and key.startswith(prefix)
    return not in_block and not key.startswith("shared.") and key.startswith(only)


def _local(entries: Mapping[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    return {key[len(prefix) :]: e for key, e in entries.items() if key.startswith(prefix)}


def _split(
    group: Mapping[str, TensorEntry], leaves: Callable[[str], bool]
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    streamed = {key: entry for key, entry in group.items() if not leaves(key)}
    return streamed, {key: entry for key, entry in group.items() if leaves(key)}


def _local_formats(formats: Formats, prefix: str, count: int) -> tuple[Formats, ...]:
    """The formats of each block's quantised linears under their local names.

    Outside the blocks nothing stays quantised: those layers are few, and errors there reach every
    token; their adapter decodes them when they are loaded.
    """
    starts = [f"{prefix}{index}." for index in range(count)]
    return tuple(
        {name[len(start) :]: fmt for name, fmt in formats.items() if name.startswith(start)}
        for start in starts
    )


def _templates(block: Any, formats: Sequence[Formats]) -> tuple[Any, ...]:
    """A block module for each block; one is shared by all blocks whose linears are stored alike."""
    made: list[tuple[Formats, Any]] = []
    templates = []
    for wanted in formats:
        known = next((module for found, module in made if found == wanted), None)
        if known is None:
            known = block if not made else copy.deepcopy(block)
            made.append((wanted, known))
        templates.append(known)
    return tuple(templates)
