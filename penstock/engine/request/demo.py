"""What ``penstock demo`` runs on: the small trained model in the box, and a picture for it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from penstock.engine.request.settings import Settings

MINI = Path(str(files("penstock"))) / "assets" / "mini"
"""A diffusers folder; training/README.md is its model card."""

DEMO_PROMPT = "a green square moves to the right"


def demo_picture() -> Path:
    """Return the first frame of the demo: a shape on a background, 64x64."""
    return MINI.parent / "demo.png"


def demo_settings(prompt: str | None = None, image: Path | None = None) -> Settings:
    """Return the demo's request, with the model's own defaults for everything else.

    Args:
        prompt, image: instead of the demo's own.
    """
    return Settings(prompt=prompt or DEMO_PROMPT, image=image or demo_picture(), seed=0)
