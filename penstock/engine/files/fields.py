"""What a value of a config may be: its type and its range, checked before anything is made of it.

The tables themselves belong to what reads a config (`penstock.engine.families.wan.fields`).
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from penstock.errors import CheckpointError
from penstock.regular import read_regular

MAX_CONFIG_BYTES = 4 << 20
"""Of a config: the largest that libraries write have some tens of kilobytes."""

_MAX_TEXT = 4096
_MAX_ITEMS = 4096
_LARGEST = 1 << 53  # whole numbers that a float holds exactly

Check: TypeAlias = Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """What a value must be.

    Attributes:
        told: what is expected, for the error.
        fits: whether a value is that.
    """

    told: str
    fits: Check


def whole(low: int, high: int) -> Field:
    """Return a whole number, the ends included; never a boolean."""
    return Field(
        f"a whole number from {low:,} to {high:,}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float, high: float) -> Field:
    """Return a finite number, the ends included."""
    return Field(
        f"a finite number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and low <= value <= high,
    )


def flag() -> Field:
    """Return true or false."""
    return Field("true or false", lambda value: type(value) is bool)


def text(*choices: str) -> Field:
    """Return one of ``choices``; without any, a short text."""
    if choices:
        return Field(" or ".join(choices), lambda value: value in choices)
    return Field(
        f"a text of up to {_MAX_TEXT} characters",
        lambda value: isinstance(value, str) and len(value) <= _MAX_TEXT,
    )


def several(item: Field, least: int, most: int) -> Field:
    """Return a list of ``least`` to ``most`` such values."""
    return Field(
        f"a list of {least} to {most} items, each {item.told}",
        lambda value: (
            isinstance(value, list | tuple)
            and least <= len(value) <= most
            and all(map(item.fits, value))
        ),
    )


def maybe(field: Field) -> Field:
    """Return that, or null."""
    return Field(f"{field.told}, or null", lambda value: value is None or field.fits(value))


def either(*fields: Field) -> Field:
    """Return one of those."""
    return Field(
        " or ".join(field.told for field in fields),
        lambda value: any(field.fits(value) for field in fields),
    )


def table(fields: Mapping[str, Field]) -> Field:
    """Return an object that has some of ``fields`` and nothing else."""
    return Field(
        f"an object of {', '.join(fields)}",
        lambda value: (
            isinstance(value, Mapping)
            and all(name in fields and fields[name].fits(each) for name, each in value.items())
        ),
    )


def check_fields(config: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """Refuse a config of which a value is not what it must be.

    Entries that ``fields`` does not name are carried along and used by nobody here; they must be
    plain all the same, because libraries get to see them.

    Raises:
        CheckpointError: names the first such entry.
    """
    for name, value in config.items():
        field = fields.get(name, _PLAIN)
        if not field.fits(value):
            raise CheckpointError(
                f"{where} cannot be used",
                expected=f"{name[:80]!r} as {field.told}",
                found=shown(value),
                remedy="The config is damaged, or of another model: copy it again",
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, Mapping):
        return len(value) <= _MAX_ITEMS and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_ITEMS and all(map(_is_plain, value))
    if type(value) is int:
        return abs(value) <= _LARGEST
    return value is None or isinstance(value, bool | float)


_PLAIN = Field(f"a plain value: texts, lists, numbers up to {_LARGEST:,}", _is_plain)


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        CheckpointError: it cannot be read, is too large or too deep, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} cannot be used",
                expected=f"a config of at most {MAX_CONFIG_BYTES:,} bytes",
                found=f"{size:,}",
            )
        content = read_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read", expected="a JSON object", found=str(error)
        ) from error
    return parse_object(content, str(path))


def parse_object(content: str | bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in ``content``, as Python reads it: NaN and infinities are numbers.

    Raises:
        CheckpointError: it is none, or is nested too deeply; names ``where``.
    """
    try:
        value = json.loads(content, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} cannot be read", expected="a JSON object", found=str(error)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} cannot be used", expected="a JSON object", found=type(value).__name__
        )
    return value


def _whole(digits: str) -> int | float:
    """Read a number as infinite if it has hundreds of digits: reading them takes long, and none
    is meant."""
    return int(digits) if len(digits) <= 20 else math.inf


def shown(value: object) -> str:
    """Return a short text for ``value``, whatever it is."""
    return reprlib.repr(value)
