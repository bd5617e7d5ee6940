"""The model and the picture that ``penstock demo`` runs on."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from penstock.engine.settings import Settings
from penstock.engine.synthetic import write_tiny_model


def demo_model(
    scratch: Path, *, prompt: str | None = None, image: Path | None = None
) -> tuple[Path, Settings]:
    """A folder with a model in the box, and settings for it.

    Args:
        scratch: an existing folder that the model and the picture may be written to.
        prompt, image: instead of the demo's own.
    """
    picture = scratch / "demo.png"
    with as_file(files("penstock") / "assets" / "demo.png") as shipped:
        picture.write_bytes(shipped.read_bytes())
    folder = write_tiny_model(scratch / "model")
    settings = Settings(
        prompt=prompt or "a red circle moves to the right",
        image=image or picture,
        max_area="128x128",
        frames=17,
        steps=8,
        seed=0,
    )
    return folder, settings
