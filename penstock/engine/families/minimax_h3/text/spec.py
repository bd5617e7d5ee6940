"""The text encoder in the planner's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.engine.families.minimax_h3.text import config as configs
from penstock.engine.families.minimax_h3.text import kind as kinds
from penstock.profiles.manifest import Storage, Weights

if TYPE_CHECKING:
    from penstock.engine.model.component import Component
    from penstock.quant.paths import Computing


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower (`Qwen3VLVisionConfig`)."""

    weights: Weights
    hidden_size: int
    intermediate_size: int
    num_heads: int
    values: int
    merged: int
    out_hidden_size: int
    mergers: int
    positions: int
    storage: Storage = Storage()


@dataclass(frozen=True)
class TextSpec:
    """The language model (`Qwen3VLTextConfig`); its embedding table is not in ``weights``.

    Attributes:
        vision: the tower that sees pictures; None: the files have none.
    """

    weights: Weights
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vision: VisionSpec | None = None
    storage: Storage = Storage()

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads' keys."""
        return self.num_key_value_heads * self.head_dim


def of(components: Mapping[str, Component], computing: Computing) -> TextSpec:
    """Return the networks as the planner knows them.

    Args:
        components: "text_encoder", and "vision" where there is one.
        computing: how their quantised matrices compute.
    """
    device = computing.scratch.device_type
    words, tower = components["text_encoder"], components.get("vision")
    vision = None
    if tower is not None:
        vision = vision_spec(
            tower.config, tower.weights(device), tower.storage(computing)
        )  # fmt: skip
    return language_spec(words.config, words.weights(device), words.storage(computing), vision)


def language_spec(
    config: Mapping[str, Any], weights: Weights, storage: Storage, vision: VisionSpec | None
) -> TextSpec:
    """Make the spec by the whole encoder's config."""
    words = configs.language(config)
    return TextSpec(
        weights=weights,
        hidden_size=words["hidden_size"],
        intermediate_size=words["intermediate_size"],
        num_attention_heads=words["num_attention_heads"],
        num_key_value_heads=words["num_key_value_heads"],
        head_dim=words["head_dim"],
        vision=vision,
        storage=storage,
    )


def vision_spec(config: Mapping[str, Any], weights: Weights, storage: Storage) -> VisionSpec:
    """Make the spec by the whole encoder's config, which has a tower."""
    tower = configs.vision(config)
    assert tower is not None
    return VisionSpec(
        weights=weights,
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        num_heads=tower["num_heads"],
        values=tower["in_channels"] * tower["temporal_patch_size"] * tower["patch_size"] ** 2,
        merged=tower["spatial_merge_size"] ** 2,
        out_hidden_size=tower["out_hidden_size"],
        mergers=len(tower["deepstack_visual_indexes"]),
        positions=tower["num_position_embeddings"],
        storage=storage,
    )


def true_text(weight_format: str = "bf16") -> TextSpec:
    """Qwen3-VL-32B without its files.

    Args:
        weight_format: of the matrices of the language model's layers.

    Raises:
        ProfileError: no such format.
    """
    from penstock.engine.families.minimax_h3.stored import plain_run, stored_run, stored_storage

    words, tower = dict(configs.LANGUAGE), dict(configs.VISION)
    layer = kinds.layer_shapes(words)
    block = stored_run(layer, weight_format)
    rest = plain_run(kinds.tower_rest_shapes(tower))
    seen = plain_run(kinds.tower_block_shapes(tower))
    config = {"text_config": words, "vision_config": tower}
    vision = vision_spec(config, Weights(rest, (seen,) * tower["depth"], 2), Storage())
    return language_spec(
        config,
        Weights(0, (block,) * configs.LAYERS, 2),
        stored_storage(layer, weight_format),
        vision,
    )
