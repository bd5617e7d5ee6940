"""The built-in description of MiniMax-H3: what its headers would say, without any file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from penstock.engine.families.minimax_h3 import structure
from penstock.engine.families.minimax_h3.config import TRANSFORMER
from penstock.engine.families.minimax_h3.manifest import H3Manifest
from penstock.engine.families.minimax_h3.sound.spec import true_audio
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.engine.families.minimax_h3.stored import (
    Shapes,
    plain_run,
    stored_run,
    stored_storage,
    typed_run,
)
from penstock.engine.families.minimax_h3.text.spec import true_text
from penstock.engine.families.minimax_h3.video_vae.spec import true_vae
from penstock.profiles.manifest import Storage, Weights

_ITEM = 2


PRUNED: Mapping[str, int] = MappingProxyType({"time_table_size": 1025, "adaln_rank": 8})
"""What the published pruned files have. Source: public converters of these files."""


def transformer(weight_format: str, changed: Mapping[str, int] | None = None) -> PackedSpec:
    """Describe it in bf16, and where the makers keep it fp32, but the blocks' matrices in
    ``weight_format``.

    Args:
        changed: entries of the config that differ from the makers'.

    Raises:
        ProfileError: no such format.
    """
    told = {**TRANSFORMER, **(changed or {})}
    shapes = structure.transformer_shapes(told)
    first = f"{structure.BLOCKS}0."
    block = {name[len(first) :]: s for name, s in shapes.items() if name.startswith(first)}
    streamed = {name: s for name, s in block.items() if not structure.leaves_stream(name)}
    once = {name: s for name, s in block.items() if structure.leaves_stream(name)}
    layers = told["num_layers"]
    config = {name: value for name, value in told.items() if name in PackedSpec.__annotations__}
    return PackedSpec(
        weights=Weights(
            _outside(shapes, structure.ENDS),
            (stored_run(streamed, weight_format),) * layers,
            _ITEM,
        ),
        once_bytes=_outside(shapes, structure.ONCE),
        table_block_bytes=(typed_run(once, structure.keeps_single),) * layers,
        storage=stored_storage(streamed, weight_format),
        table_storage=Storage(),
        **config,
    )


def _outside(shapes: Shapes, parts: tuple[str, ...]) -> int:
    found = {name: shape for name, shape in shapes.items() if name.startswith(parts)}
    single = {name: shape for name, shape in found.items() if structure.keeps_single(name)}
    rest = {name: shape for name, shape in found.items() if name not in single}
    return plain_run(single, "F32") + (plain_run(rest) if rest else 0)


def minimax_h3(weight_format: str, changed: Mapping[str, int] | None = None) -> H3Manifest:
    """MiniMax-H3; the text encoder's layers in ``weight_format`` as well.

    Args:
        changed: entries of the transformer's config that differ from the makers'.

    Raises:
        ProfileError: no such format.
    """
    denoiser = transformer(weight_format, changed)
    return H3Manifest(denoiser, true_text(weight_format), true_vae(), true_audio())


def minimax_h3_pruned(weight_format: str) -> H3Manifest:
    """Return the same with the pruned transformer, of 20 B parameters.

    Raises:
        ProfileError: no such format.
    """
    return minimax_h3(weight_format, PRUNED)


BUILTIN: Mapping[str, Callable[[str], H3Manifest]] = MappingProxyType(
    {"minimax-h3": minimax_h3, "minimax-h3-pruned": minimax_h3_pruned}
)
