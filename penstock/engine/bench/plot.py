"""Seconds a step against VRAM, as a picture; drawn with Pillow, which is there anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from penstock.errors import UsageError

PNG = b"\x89PNG\r\n\x1a\n"
"""The first bytes of such a file."""

_SIZE = (900, 560)
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 60, 860, 490
_INK, _FAINT, _LINE = (30, 30, 30), (215, 215, 215), (30, 90, 200)
_TICKS = 6


@dataclass(frozen=True)
class Dot:
    """One measurement: its place, and what is written beside it."""

    x: float
    y: float
    label: str


def draw(dots: Sequence[Dot], path: Path, *, title: str, x_label: str, y_label: str) -> None:
    """Write a PNG of ``dots`` joined by a line, both axes from 0.

    Raises:
        UsageError: there is nothing to draw, or the file cannot be written.
    """
    if not dots:
        raise UsageError("nothing to draw", expected="one measurement or more", found="none")
    image = Image.new("RGB", _SIZE, "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    x_top, y_top = _round_up(max(d.x for d in dots)), _round_up(max(d.y for d in dots))
    _axes(canvas, font, x_top, y_top)
    canvas.text((_LEFT, 18), title, fill=_INK, font=font)
    canvas.text((_RIGHT, _BOTTOM + 36), x_label, fill=_INK, font=font, anchor="ra")
    canvas.text((_LEFT, _TOP - 8), y_label, fill=_INK, font=font, anchor="ls")
    placed = [
        (*_place(dot.x / x_top, dot.y / y_top), dot.label) for dot in sorted(dots, key=_from_left)
    ]
    canvas.line([(x, y) for x, y, _ in placed], fill=_LINE, width=2)
    for x, y, label in placed:
        canvas.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_LINE)
        canvas.text((x + 8, y - 10), label, fill=_INK, font=font, anchor="ls")
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise UsageError(f"{path} cannot be written", found=str(error)) from error


def _from_left(dot: Dot) -> tuple[float, float]:
    return dot.x, dot.y


def _place(x_share: float, y_share: float) -> tuple[float, float]:
    return _LEFT + x_share * (_RIGHT - _LEFT), _BOTTOM - y_share * (_BOTTOM - _TOP)


def _axes(
    canvas: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    x_top: float,
    y_top: float,
) -> None:
    for tick in range(_TICKS + 1):
        share = tick / _TICKS
        x, y = _place(share, share)
        canvas.line([(x, _TOP), (x, _BOTTOM)], fill=_FAINT)
        canvas.line([(_LEFT, y), (_RIGHT, y)], fill=_FAINT)
        canvas.text((x, _BOTTOM + 8), f"{share * x_top:g}", fill=_INK, font=font, anchor="ma")
        canvas.text((_LEFT - 8, y), f"{share * y_top:g}", fill=_INK, font=font, anchor="rm")
    canvas.rectangle((_LEFT, _TOP, _RIGHT, _BOTTOM), outline=_INK)


def _round_up(value: float) -> float:
    """Return the next value above that divides by `_TICKS` into short numbers."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value / _TICKS))
    steps = (1, 2, 2.5, 5, 10, 20)  # 20: of 9.9 units and more, the margin reaches beyond 10
    step = next(each * unit for each in steps if each * unit * _TICKS >= value * 1.02)
    return round(step * _TICKS, 12)
