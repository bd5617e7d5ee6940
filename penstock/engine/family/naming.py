"""The names that a project gives to the tensors of a network, and what their shapes tell.

A naming is a table of module paths; what follows the path in a key (``.weight``, ``.bias`` or the
suffix of a quantised storage) is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import TensorMismatch

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "vision_model.", "visual.")
"""What some files put before every name."""

_DEEPEST = 8
"""Parts of the longest module path in any table; longer keys are not searched further."""

THREE = "{qkv}"
"""In a target: it stands for three, whose names have q, k or v there; they are the tensor's rows,
one after another."""

FUSED_QKV = f"self_attn.{THREE}_proj"
"""Such a target, of transformers' names."""


@dataclass(frozen=True)
class Naming:
    """One project's names of one component.

    Attributes:
        component: transformer, vae, text_encoder or image_encoder.
        author: whose names they are, for people.
        marks: keys (without prefix) begin with each of these: how the naming is recognised.
        block, target: what begins the names of the blocks' tensors, here and in diffusers.
        inside, outside: module paths inside a block and elsewhere; None: they are diffusers' own.
        ignored: key beginnings that belong to the file and are not needed.
        config: what a config says besides, of a file whose tensors bear these names.
        halves: modules whose rows are two halves, in an order that ``config`` tells.
    """

    component: str
    author: str
    marks: tuple[str, ...]
    block: str = ""
    target: str = ""
    inside: Mapping[str, str] | None = None
    outside: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    halves: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """Return the name that diffusers or transformers gives to ``key``; None if it is
        unknown."""
        if self.inside is None:
            return key
        match = re.match(rf"{re.escape(self.block)}(\d+)\.", key) if self.block else None
        if match is None:
            return _longest(key, self.outside)
        local = _longest(key[match.end() :], self.inside)
        return None if local is None else f"{self.target}{match[1]}.{local}"


def _longest(key: str, table: Mapping[str, str]) -> str | None:
    """Return ``key`` with its longest leading module path in ``table`` replaced."""
    parts = key.split(".", _DEEPEST)
    for count in range(min(len(parts), _DEEPEST), 0, -1):
        path = ".".join(parts[:count])
        if path in table:
            return table[path] + key[len(path) :]
    return None


class ShapesOf:
    """The logical shapes of a component's tensors, with the right error for one that is missing."""

    def __init__(self, where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.where, self._shapes = where, shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        """Return the shape of ``name``.

        Raises:
            TensorMismatch: there is no such tensor, or it has not ``dims`` dimensions.
        """
        shape = self._shapes.get(name)
        if shape is None or len(shape) != dims or 0 in shape:
            raise TensorMismatch(
                f"{self.where} is incomplete",
                expected=f"{name} with {dims} dimensions",
                found="none" if shape is None else f"shape {list(shape)}",
                remedy="The file is incomplete or belongs to another model: copy it again.",
            )
        return shape

    def count(self, prefix: str) -> int:
        """Return the blocks named ``prefix`` + number: one more than the largest number.

        Raises:
            TensorMismatch: that is more than there are tensors.
        """
        numbers = {
            int(number)
            for name in self._shapes
            if name.startswith(prefix)
            and re.fullmatch("[0-9]{1,6}", number := name[len(prefix) :].partition(".")[0])
        }
        count = max(numbers, default=-1) + 1
        if count > len(self._shapes):
            raise TensorMismatch(
                f"{self.where} is incomplete",
                expected=f"the tensors of {prefix}0 to {prefix}{count - 1}",
                found=f"{len(self._shapes)} tensors in all",
                remedy="The file is incomplete or belongs to another model: copy it again.",
            )
        return count
