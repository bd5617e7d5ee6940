"""From what stands in a node to what is asked of the engine: a zero, an empty text or the first
word of a list leaves a gap, which the model, the profile or the machine fills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELS_OWN = "model's own"
AUTO = "auto"

_NUMBERS = {
    "frames": "frames",
    "steps": "steps",
    "cfg": "guidance_scale",
    "cfg_high": "guidance_high",
    "shift": "shift",
    "fps": "fps",
    "nag": "nag_scale",
    "window": "window",
    "overlap": "overlap",
}
"""Inputs, and the settings that they are."""

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
    said = {ours: inputs.get(theirs) or None for theirs, ours in _NUMBERS.items()}
    said |= {name: None if path is None else str(path) for name, path in files.items()}
    width, height = inputs.get("width") or 0, inputs.get("height") or 0
    said |= {
        "cfg_interval": (inputs.get("cfg_interval") or "").strip() or None,
        "prompt": inputs["prompt"],
        "negative_prompt": inputs.get("negative") or None,
        "size": f"{width}x{height}" if width or height else None,
        "seed": inputs["seed"],
        "sampler": _word(inputs.get("sampler"), MODELS_OWN),
        "fit": _word(inputs.get("fit"), MODELS_OWN),
        "distilled": inputs.get("distilled") or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def options_of(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return `penstock.profiles.options.Options` as plain values."""
    words = {ours: _word(inputs.get(theirs), AUTO) for theirs, ours in _OPTIONS.items()}
    return {name: word for name, word in words.items() if word is not None}


def _word(text: str | None, gap: str) -> str | None:
    text = (text or "").strip()
    return None if text in ("", gap) else text
