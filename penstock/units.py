"""Bytes as people write them, and as the engine counts them: always ints, always binary units."""

from __future__ import annotations

import re

from penstock.errors import UsageError, brief

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MOST_BYTES = (1 << 63) - 1
"""What a file or a memory can have at most on any system."""

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kb": KIB, "kib": KIB,
    "m": MIB, "mb": MIB, "mib": MIB,
    "g": GIB, "gb": GIB, "gib": GIB,
    "t": 1 << 40, "tb": 1 << 40, "tib": 1 << 40,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Parse the bytes named by ``text``: ``"11.5GiB"``, ``"512M"``, ``"1024"``; an int passes
    through.

    Units are binary whatever their spelling, as GPU makers use them (a "12 GB" card holds 12 GiB).

    Raises:
        UsageError: the text is no size, or not positive.
    """
    value = text if type(text) is int else _from_words(text)
    if not 0 < value <= MOST_BYTES:
        raise UsageError(
            "size out of range",
            expected=f"1 byte to {MOST_BYTES:,} bytes",
            found=brief(text),
        )
    return value


def _from_words(text: object) -> int:
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            "not a size in bytes",
            expected='a number with a unit, such as "11.5GiB" or "512MiB"',
            found=brief(text),
        )
    amount = float(match[1]) * factor
    return round(amount) if amount <= MOST_BYTES else MOST_BYTES + 1


def format_bytes(count: int) -> str:
    """Return ``count`` bytes for people: ``"11.50 GiB"``, ``"512.0 MiB"``, ``"17 B"``."""
    for unit, factor, digits in (("GiB", GIB, 2), ("MiB", MIB, 1), ("KiB", KIB, 1)):
        if abs(count) >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count} B"


def align_up(count: int, alignment: int) -> int:
    """Return the smallest multiple of ``alignment`` that is not below ``count``."""
    return -(-count // alignment) * alignment
