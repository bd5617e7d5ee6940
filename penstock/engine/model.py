"""Opening a model folder: configs, headers, the layout of every network. No weights are read.

A network is a skeleton on the meta device (the class and the parameter names of diffusers or
transformers, with a single block), plus the places of its tensors: one layout for all that is not
in a block, and one per block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.engine.request import Grid
from penstock.engine.wan.forward import is_cross_kv
from penstock.engine.weights import skeleton
from penstock.errors import CheckpointError, TensorMismatch
from penstock.offload.checkpoint import Checkpoint, TensorEntry, torch_dtype
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import (
    ImageSpec,
    ModelManifest,
    TextSpec,
    TransformerSpec,
    VaeSpec,
    Weights,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Component:
    """One network: its skeleton and the places of its weights.

    Attributes:
        name: its folder's name.
        module: the network on the meta device, with one block; ours to bind tensors to.
        block: that block, the template of all (None: the network has no blocks).
        rest: everything outside the blocks.
        blocks: one layout a block.
        cross: the cross-attention K/V projections of each block, which leave the stream (DiT).
        dtype: the type it computes in, that of its largest matrices.
    """

    name: str
    module: Any
    block: Any
    checkpoint: Checkpoint
    rest: BlockLayout
    blocks: tuple[BlockLayout, ...]
    cross: tuple[BlockLayout, ...]
    dtype: torch.dtype

    @property
    def weights(self) -> Weights:
        """The bytes of it, for the planner."""
        return Weights(
            rest_bytes=self.rest.nbytes,
            block_bytes=tuple(layout.nbytes for layout in self.blocks),
            itemsize=self.dtype.itemsize,
        )


@dataclass(frozen=True)
class ModelFiles:
    """A Wan2.1 model in diffusers' folder layout, opened by its headers alone."""

    folder: Path
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
    def open(cls, folder: Path) -> ModelFiles:
        """Describe the model in ``folder`` without reading a weight.

        Raises:
            CheckpointError: no Wan2.1 pipeline, or one that penstock does not run.
            HeaderError, PickleRefused, TensorMismatch: a component's files cannot be used.
        """
        _check_index(folder)
        transformer = _open_transformer(folder)
        text = _open_text(folder)
        encoder, decoder = _open_vae(folder)
        has_image = transformer.module.config.image_dim is not None
        image = _open_image(folder) if has_image else None
        return cls(
            folder=folder,
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

    def close(self) -> None:
        """Close the files."""
        for component in self.components():
            component.checkpoint.close()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "not a model folder",
            expected=f"a file {path.name} in {path.parent}",
            found="none",
            remedy="Give the folder that holds model_index.json, as diffusers saves it.",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read", expected="a JSON object", found=str(error)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} cannot be used", expected="a JSON object", found=type(value).__name__
        )
    return value


def _check_index(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    known = ("WanImageToVideoPipeline", "WanPipeline")
    found = index.get("_class_name")
    if found not in known:
        raise CheckpointError(
            f"{folder} holds another kind of model", expected=" or ".join(known), found=str(found)
        )
    second = index.get("transformer_2") or [None, None]
    if second[0] is not None or index.get("expand_timesteps"):
        raise CheckpointError(
            f"{folder} holds a Wan 2.2 model",
            expected="Wan 2.1: one transformer, one timestep a step",
            found="two transformers or expanded timesteps",
        )


def _config(folder: Path, name: str) -> dict[str, Any]:
    config = read_json(folder / name / "config.json")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _open_transformer(folder: Path) -> Component:
    from diffusers import WanTransformer3DModel

    config = _config(folder, "transformer")
    if config.get("pos_embed_seq_len") is not None:
        raise CheckpointError(
            "first-and-last-frame models are not supported",
            expected="pos_embed_seq_len absent",
            found=str(config["pos_embed_seq_len"]),
        )
    module = skeleton(WanTransformer3DModel, config | {"num_layers": 1})
    return _component(
        folder / "transformer",
        module,
        module.blocks[0],
        prefix="blocks.",
        count=config.get("num_layers", 40),
        leaves_stream=is_cross_kv,
    )


def _open_text(folder: Path) -> Component:
    from transformers import UMT5Config, UMT5EncoderModel

    config = _config(folder, "text_encoder")
    module = skeleton(UMT5EncoderModel, UMT5Config(**(config | {"num_layers": 1})))
    return _component(
        folder / "text_encoder",
        module,
        module.encoder.block[0],
        prefix="encoder.block.",
        count=config["num_layers"],
        gathered=("shared.weight",),
        ignored=("encoder.embed_tokens.weight",),
    )


def _open_image(folder: Path) -> Component:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = _config(folder, "image_encoder")
    module = skeleton(CLIPVisionModel, CLIPVisionConfig(**(config | {"num_hidden_layers": 1})))
    component = _component(
        folder / "image_encoder",
        module,
        module.encoder.layers[0],
        prefix="encoder.layers.",
        count=config["num_hidden_layers"],
        ignored=("embeddings.position_ids", "visual_projection.weight"),
        strip="vision_model.",
    )
    # The model is conditioned on hidden_states[-2]: the last layer is never computed.
    return _replace_blocks(component, component.blocks[:-1])


def _open_vae(folder: Path) -> tuple[Component, Component]:
    from diffusers import AutoencoderKLWan

    config = _config(folder, "vae")
    halves = []
    for half, parts in (("encoder", ("encoder.", "quant_conv.")),
                        ("decoder", ("decoder.", "post_quant_conv."))):  # fmt: skip
        module = skeleton(AutoencoderKLWan, config)
        component = _component(folder / "vae", module, None, only=parts, name=f"vae {half}")
        halves.append(component)
    return halves[0], halves[1]


def _replace_blocks(component: Component, blocks: tuple[BlockLayout, ...]) -> Component:
    from dataclasses import replace

    return replace(component, blocks=blocks)


def _component(
    folder: Path,
    module: Any,
    block: Any,
    *,
    prefix: str = "",
    count: int = 0,
    leaves_stream: Callable[[str], bool] = lambda name: False,
    gathered: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    only: tuple[str, ...] = ("",),
    strip: str = "",
    name: str = "",
) -> Component:
    checkpoint = Checkpoint.open(folder)
    entries = {key.removeprefix(strip): entry for key, entry in checkpoint.items()}
    entries = {key: entry for key, entry in entries.items() if key not in ignored}
    check_tensors(folder, entries, _expected(module, block, prefix, count, ignored))
    rest = {
        key: entry
        for key, entry in entries.items()
        if not (prefix and key.startswith(prefix)) and key not in gathered and key.startswith(only)
    }
    local = [_local(entries, f"{prefix}{index}.") for index in range(count)]
    return Component(
        name=name or folder.name,
        module=module,
        block=block,
        checkpoint=checkpoint,
        rest=BlockLayout.from_entries(rest),
        blocks=tuple(
            BlockLayout.from_entries({k: e for k, e in block.items() if not leaves_stream(k)})
            for block in local
        ),
        cross=tuple(
            BlockLayout.from_entries({k: e for k, e in block.items() if leaves_stream(k)})
            for block in local
            if any(map(leaves_stream, block))
        ),
        dtype=_compute_dtype(local[0] if local else rest),
    )


def _local(entries: Mapping[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    return {key[len(prefix) :]: e for key, e in entries.items() if key.startswith(prefix)}


def _compute_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    return torch_dtype(max(entries.values(), key=lambda entry: entry.nbytes).dtype)


def _expected(
    module: Any, block: Any, prefix: str, count: int, ignored: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    shapes = {key: shape for key, shape in shapes.items() if key not in ignored}
    if block is None:
        return shapes
    template = {key: tuple(t.shape) for key, t in block.state_dict().items()}
    expected = {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}
    for index in range(count):
        expected |= {f"{prefix}{index}.{key}": shape for key, shape in template.items()}
    return expected


def check_tensors(where: Path, entries: Mapping[str, TensorEntry], expected: Shapes) -> None:
    """Compare the tensors of a file with those that its config demands.

    Raises:
        TensorMismatch: names the first missing, extra or misshaped tensor and how many there are.
    """
    order = _natural
    for what, names in (
        ("missing", sorted(expected.keys() - entries.keys(), key=order)),
        ("unknown", sorted(entries.keys() - expected.keys(), key=order)),
    ):
        if names:
            raise TensorMismatch(
                f"{where} does not hold the tensors its config demands",
                expected=f"{len(expected)} tensors",
                found=f"{len(names)} {what}, the first is {names[0]}",
                remedy="The files are incomplete or belong to another model: copy them again.",
            )
    wrong = sorted((n for n in expected if entries[n].shape != expected[n]), key=order)
    if wrong:
        first = wrong[0]
        raise TensorMismatch(
            f"{where} does not hold the shapes its config demands ({len(wrong)} differ)",
            expected=f"{first} of shape {list(expected[first])}",
            found=str(list(entries[first].shape)),
            remedy="Weights and config.json belong to different models: copy both again.",
        )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


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
