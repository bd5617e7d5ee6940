"""From what stands in a node to what is asked of the engine: a zero, an empty text or the first
word of a list leaves a gap, which the model, the profile or the machine fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from penstock.engine.request.settings import Settings

MODELS_OWN = "model's own"
AUTO = "auto"

_WORDS = {
    "cfg": "guidance_scale",
    "cfg_high": "guidance_high",
    "nag": "nag_scale",
}
"""Inputs that are called otherwise than the settings that they are."""

_SETTINGS = frozenset(each.name for each in fields(Settings))

_OPTIONS = {
    "profile": "profile",
    "vram": "vram",
    "ram": "ram",
    "cache": "step_cache",
    "attention": "attention",
    "device": "device",
}


def settings_of(inputs: Mapping[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Return `penstock.engine.request.settings.Settings` as plain values.

    Args:
        inputs: of the node, by their names.
        files: "image", "last_image" and "after".
    """
    # All others are called as the settings are.
    named = {_WORDS.get(name, name): value for name, value in inputs.items()}
    said = {
        name: _filled(value) for name, value in named.items() if name in _SETTINGS - files.keys()
    }
    said |= {name: None if path is None else str(path) for name, path in files.items()}
    width, height = inputs.get("width") or 0, inputs.get("height") or 0
    said |= {
        "prompt": inputs["prompt"],
        "negative_prompt": inputs.get("negative") or None,
        "size": f"{width}x{height}" if width or height else None,
        "seed": inputs["seed"],
    }
    return {name: value for name, value in said.items() if value is not None}


def options_of(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return `penstock.profiles.options.Options` as plain values."""
    words = {ours: _word(inputs.get(theirs), AUTO) for theirs, ours in _OPTIONS.items()}
    return {name: word for name, word in words.items() if word is not None}


def _filled(value: Any) -> Any:
    """Return None for what leaves a gap."""
    return _word(value, MODELS_OWN) if isinstance(value, str) else value or None


def _word(text: str | None, gap: str) -> str | None:
    text = (text or "").strip()
    return None if text in ("", gap) else text
