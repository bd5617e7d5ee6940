"""What ``penstock`` alone shows: what to do first, in the order in which it is done."""

from __future__ import annotations

from penstock._version import __version__
from penstock.cli.layout import labelled, wrap

_STEPS = (
    ("penstock demo", "Make a small video now: the model is in the box, a CPU is enough."),
    ("penstock doctor", "Measure this machine, so that plans know its speed."),
    (
        "penstock plan --synthetic wan2.1-i2v-14b",
        "Predict memory and time of a 14 B model here, without any file of it.",
    ),
    (
        "penstock generate --model FOLDER --prompt TEXT -o video.mp4",
        "Make a video from a folder of ComfyUI, diffusers or Wan; --image PICTURE starts it.",
    ),
    ("penstock serve --model FOLDER", "Make videos in the browser, and over HTTP."),
)

_MORE = (
    ("penstock resume", "continues a job that was stopped or killed"),
    ("penstock --help", "lists all commands"),
)


def first_steps(width: int) -> str:
    """Lay out what to do first in lines of ``width`` cells."""
    lines = wrap(f"penstock {__version__}: video models far larger than the card", width)
    for command, what in _STEPS:
        lines += ["", *wrap(command, width, "  ", "      "), *labelled("", what, width, 6)]
    lines.append("")
    for command, what in _MORE:
        lines += wrap(f"{command}  {what}", width, "  ", "      ")
    return "\n".join(lines)
