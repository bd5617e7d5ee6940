"""The networks of a model without weights: modules on the meta device, each with one block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.families.minimax_h3 import modules
from penstock.engine.families.minimax_h3.fields import known
from penstock.engine.families.minimax_h3.sound import kind as sound
from penstock.engine.families.minimax_h3.text import modules as text
from penstock.engine.families.minimax_h3.video_vae import kind as video


def build(component: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Build the network of ``component`` under ``config``, and its one block (None: it has
    none)."""
    if component == "transformer":
        return modules.build(known(config))
    if component in ("vae_encoder", "vae_decoder"):
        return video.build(component, config)
    if component == "audio_vae":
        return sound.build(config)
    if component == "vision":
        return text.build_vision(config)
    return text.build_language(config)
