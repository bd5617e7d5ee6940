"""What a planner may choose from: ceilings in bytes, and rules that narrow the search."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from penstock.errors import ProfileError, brief
from penstock.profiles.attending import SDPA, Attending
from penstock.profiles.caching import OFF, Caching

Disk = Literal["auto", "spare", "never"]
Compute = Literal["exact", "fast"]
Place = Literal["auto", "vram", "ram"]
Residual = Literal["auto", "bf16", "fp32"]

RESIDUALS = ("bf16", "fp32")
AUTO = "auto"
"""The word that leaves a choice open."""

_TILES = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_MOST = 10**18


@dataclass(frozen=True)
class Limits:
    """Ceilings that no phase may pass.

    Attributes:
        pinned_bytes: of page-locked host memory, a part of ``ram_bytes``; None: all of it.
        both_bytes: of VRAM and RAM together, where they are the same memory; None: no such limit.
    """

    vram_bytes: int
    ram_bytes: int
    pinned_bytes: int | None = None
    both_bytes: int | None = None

    def beside(self, vram_bytes: int, ram_bytes: int, *, pins: bool) -> Limits:
        """Return what is left beside so many bytes; where nothing is ``pins``-ed, no limit for
        page-locked memory."""
        both = self.both_bytes
        return Limits(
            self.vram_bytes - vram_bytes,
            self.ram_bytes - ram_bytes,
            self.pinned_bytes if pins else None,
            None if both is None else both - vram_bytes - ram_bytes,
        )


@dataclass(frozen=True)
class Policy:
    """Rules for the choice; the defaults leave everything to the search.

    Attributes:
        branches: CFG branches a visit: 1, 2, or None.
        chunk_tokens: tokens a chunk of the DiT, or None.
        tiles: rows and columns of VAE tiles, or None.
        cross_kv: where cross-attention K/V are kept.
        compute: "exact" decodes quantised weights; "fast" multiplies in 8 bits where it can.
        attention: what the transformer's self-attention runs on: "sdpa", torch's own in the compute
            dtype; others as `penstock.profiles.attending.Attending.of` reads them, which a machine
            must have shown that it can.
        residual: what the transformer's hidden states are kept in between operations: "fp32", as
            the makers do; "bf16", the compute dtype; "auto", fp32 where that costs next to no time.
        step_cache: of forward passes, as `penstock.profiles.caching.Caching.of` reads it.
        disk: "auto" lets blocks stream from disk at every pass where that costs no time; "spare"
            prefers memory that is free anyway; "never" forbids it.
    """

    branches: int | None = None
    chunk_tokens: int | None = None
    tiles: tuple[int, int] | None = None
    cross_kv: Place = "auto"
    compute: Compute = "exact"
    disk: Disk = "auto"
    attention: str = SDPA
    residual: Residual = "auto"
    step_cache: str = OFF

    def __post_init__(self) -> None:
        self._require("branches", self.branches in (None, 1, 2), "1, 2 or auto")
        small = self.chunk_tokens is not None and self.chunk_tokens < 1
        self._require("chunk_tokens", not small, "1 or more, or auto")
        flat = self.tiles is not None and min(self.tiles) < 1
        self._require("tiles", not flat, "ROWSxCOLUMNS, 1x1 or more, or auto")
        self._require("cross_kv", self.cross_kv in ("auto", "vram", "ram"), "auto, vram or ram")
        self._require("compute", self.compute in ("exact", "fast"), "exact or fast")
        self._require("residual", self.residual in ("auto", *RESIDUALS), "auto, bf16 or fp32")
        self._require("disk", self.disk in ("auto", "spare", "never"), "auto, spare or never")
        Caching.of(self.step_cache)
        parted = self.attending.backend.whole and self.chunk_tokens is not None
        self._require("chunk_tokens", not parted, "none beside an attention of all tokens at once")

    @property
    def attending(self) -> Attending:
        """``attention``, read."""
        return Attending.of(self.attention)

    @property
    def caching(self) -> Caching:
        """``step_cache``, read."""
        return Caching.of(self.step_cache)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ProfileError(
                f"illegal {name}", expected=expected, found=brief(getattr(self, name))
            )

    def words(self) -> dict[str, str]:
        """Return each rule as files and flags spell it."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: _spelled(value) for name, value in found.items()}


def policy_of(words: Mapping[str, Any], base: Policy) -> Policy:
    """Return ``base`` with what ``words`` say, as files and flags spell it.

    Raises:
        ProfileError: a word that is none.
    """
    read = {
        name: _READ[name](name, word) if name in _READ else word for name, word in words.items()
    }
    return replace(base, **read)


def _spelled(value: object) -> str:
    if value is None:
        return AUTO
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _count(name: str, word: object) -> int | None:
    if word == AUTO:
        return None
    if type(word) is int and abs(word) < _MOST:
        word = str(word)
    if not isinstance(word, str) or not _WHOLE.fullmatch(word):
        raise ProfileError(f"illegal {name}", expected="a whole number or auto", found=brief(word))
    return int(word)


def _grid(name: str, word: object) -> tuple[int, int] | None:
    if word == AUTO:
        return None
    match = _TILES.fullmatch(word) if isinstance(word, str) else None
    if match is None:
        raise ProfileError(
            f"illegal {name}", expected='ROWSxCOLUMNS, such as "3x3", or auto', found=brief(word)
        )
    return int(match[1]), int(match[2])


_READ: Mapping[str, Callable[[str, object], Any]] = MappingProxyType(
    {"branches": _count, "chunk_tokens": _count, "tiles": _grid}
)
"""How the rules that are no words are read."""
