"""Every value of the transformer's config: what it may be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from penstock.engine.families.minimax_h3.config import PATCH_TAKEN, TRANSFORMER
from penstock.engine.files.fields import Field, check_fields, flag, number, several, whole
from penstock.errors import CheckpointError

_WIDTH = whole(1, 1 << 20)
_LAYERS = whole(1, 256)
_EPSILON = number(0, 1)
_EVEN = Field(
    "an even number from 2 to 4,096",
    lambda value: type(value) is int and 2 <= value <= 4096 and value % 2 == 0,
)

FIELDS: Mapping[str, Field] = MappingProxyType({
    "num_attention_heads": whole(1, 4096),
    "attention_head_dim": _EVEN,
    "hidden_size": _WIDTH,
    "num_layers": _LAYERS,
    "num_refiner_layers": whole(1, 8),
    "ffn_dim": _WIDTH,
    "in_channels": whole(1, 4096),
    "audio_in_channels": whole(1, 4096),
    "patch_size": several(whole(1, 64), 3, 3),
    "text_dim": _WIDTH,
    "freq_dim": whole(2, 1 << 16),
    "time_embed_hidden_dim": _WIDTH,
    "time_embed_dim": _WIDTH,
    "rope_freq_dim": whole(1, 1024),
    "rope_theta": number(1, 1e9),
    "norm_eps": _EPSILON,
    "qk_norm_eps": _EPSILON,
    "final_norm_eps": _EPSILON,
    "gate_first": flag(),
    "time_table_size": Field(
        "0, or from 2 to 1,048,576 points",
        lambda value: type(value) is int and (value == 0 or 2 <= value <= 1 << 20),
    ),
    "adaln_rank": whole(0, 1 << 20),
})  # fmt: skip


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a config of which a value is not what it must be.

    Raises:
        CheckpointError: names the entry.
    """
    check_fields(config, FIELDS, where)
    whole_config = {**TRANSFORMER, **config}
    turned = 6 * whole_config["rope_freq_dim"]
    wrong = (
        (turned > whole_config["attention_head_dim"],
         f"heads of {turned} channels or more, which are turned", "attention_head_dim"),
        (tuple(whole_config["patch_size"]) != PATCH_TAKEN,
         f"patches of {PATCH_TAKEN}", "patch_size"),
        (bool(whole_config["time_table_size"]) != bool(whole_config["adaln_rank"]),
         "an adaln_rank beside a time_table_size, or neither", "adaln_rank"),
    )  # fmt: skip
    for is_wrong, expected, name in wrong:
        if is_wrong:
            raise CheckpointError(
                f"{where} cannot be used",
                expected=expected,
                found=str(whole_config[name]),
                remedy="The config is damaged, or of another model: copy it again",
            )


def known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of ``config`` that are checked: what the module is made with."""
    return {name: value for name, value in config.items() if name in FIELDS}
