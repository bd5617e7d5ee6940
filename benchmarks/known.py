"""What models are released with and consist of, as plans take them: tables of `benchmarks.plans`
``defaults`` and ``parts``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import Results, Rows, table
from penstock.engine.families.minimax_h3.config import SOUND_SHIFT

PICTURE, TEXT = "a picture and a prompt", "a prompt"
MODELS: Mapping[str, tuple[str, str]] = {
    "wan2.1-i2v-14b": ("Wan2.1 I2V 14B", PICTURE),
    "wan2.1-t2v-14b": ("Wan2.1 T2V 14B", TEXT),
    "wan2.1-t2v-1.3b": ("Wan2.1 T2V 1.3B", TEXT),
    "wan2.1-flf2v-14b": ("Wan2.1 FLF2V 14B", "`--image` and `--last-image`"),
    "wan2.2-t2v-a14b": ("Wan2.2 T2V A14B", TEXT),
    "wan2.2-i2v-a14b": ("Wan2.2 I2V A14B", "a picture, a last one if you like, and a prompt"),
    "wan2.2-ti2v-5b": ("Wan2.2 TI2V 5B", "a prompt, with or without a picture"),
    "minimax-h3": ("MiniMax-H3", "a prompt; `--image`, `--last-image`, both or none"),
}
"""Names and inputs by the name of a built-in description; one that shares another's is left out."""
FINE_SIDE = 16
"""Sides that need not be mentioned: those of nearly all models."""


def model_defaults(results: Results) -> str:
    """What a request takes where it says nothing."""
    found = {row["model"]: row for row in results["plans_defaults"]}
    headings = ("model", "what it takes", "size", "frames", "steps", "guidance", "shift")
    rows: Rows = [
        (name, takes, *cells(found[model], takes.startswith("a picture") or "FLF" in name))
        for model, (name, takes) in MODELS.items()
    ]
    return table(headings, rows)


def cells(row: Mapping[str, Any], pictured: bool) -> tuple[str, ...]:
    """Size, frames, steps, guidance and shift."""
    size = (
        f"the picture's aspect, {row['height']}p" if pictured else f"{row['width']}x{row['height']}"
    )
    if row["side"] > FINE_SIDE:
        size += f", sides in multiples of {row['side']}"
    sound = "-h3" in row["model"]
    frames = f"{row['frames']}"
    if row["frames_at_most"]:
        frames += " to {} ({} n + {})".format(row["frames_at_most"], *row["frames_by"])
    guided = max(row["guidance"]) > 1
    shift = f"{row['shift']:g}"
    if row["shift_at_480p"] != row["shift"]:
        shift += f" ({row['shift_at_480p']:g} at 480p)"
    return (
        size,
        f"{frames} at {row['fps']:g} fps",
        str(row["steps"]),
        ", ".join(f"{each:g}" for each in row["guidance"]) if guided else "none",
        f"{shift} (sound: {SOUND_SHIFT:g})" if sound else shift,
    )


def model_parts(results: Results) -> str:
    """Networks, their parameters, and what files of them take in 16 and in 8 bits."""
    rows: Rows = [
        (row["part"], f"{row['parameters'] / 1e9:.2f} B",
         gb(2 * row["parameters"]), gb(row["parameters"]))
        for row in results["plans_parts"]
    ]  # fmt: skip
    return table(("part", "parameters", "16 bits", "8 bits"), rows)


def gb(nbytes: float) -> str:
    """Bytes, as shops say them."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e9:.2f} GB"
