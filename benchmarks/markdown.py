"""Tables in Markdown, and how figures are written in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.units import GIB, MIB

Rows = list[tuple[str, ...]]
Results = Mapping[str, Any]
"""What lies in benchmarks/results: each JSON file by its name without the ending."""


def table(headings: Sequence[str], rows: Rows) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def named(results: Results, prefix: str) -> Iterator[Any]:
    """The results whose file begins so."""
    return (value for name, value in results.items() if name.startswith(prefix))


def gib(nbytes: float) -> str:
    """Bytes, shortly."""
    return f"{nbytes / GIB:.2f} GiB"


def mib(nbytes: float) -> str:
    """Bytes, shortly, where they are few."""
    return f"{nbytes / MIB:.0f} MiB"


def between(values: Sequence[float], digits: int = 2) -> str:
    """The least and the most, once where they are written alike."""
    low, high = (f"{each:.{digits}f}" for each in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
