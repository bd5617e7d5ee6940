"""Networks without weights, built when a job first needs one: diffusers and transformers take
seconds to load, and a plan or a refusal needs neither."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from penstock.quant.compute import Computing
from penstock.quant.format import QuantFormat
from penstock.quant.linear import replace_linears

Formats = Mapping[str, QuantFormat]

Build = Callable[[], tuple[Any, Any]]
"""Makes a network on the meta device, with one block; and that block (None: it has none)."""


class Skeleton:
    """A network of one component. One job at a time uses it, and the first builds it.

    Args:
        build: makes it.
        formats: of the quantised linears of each block.
        dtype: the type it computes in.
    """

    def __init__(self, build: Build, formats: tuple[Formats, ...], dtype: torch.dtype) -> None:
        self._build, self._formats, self._dtype = build, formats, dtype
        self._computing: Computing | None = None
        self._installed: set[int] = set()

    def install(self, computing: Computing) -> None:
        """Let quantised linears compute so, once they are made. The first call counts."""
        self._computing = self._computing or computing

    @property
    def module(self) -> Any:
        """The network."""
        return self._parts[0]

    @property
    def templates(self) -> tuple[Any, ...]:
        """The block module of each block, quantised linears in it as its files store them."""
        templates = self._parts[1]
        if self._computing is not None and not self._installed:
            for template, formats in zip(templates, self._formats, strict=True):
                if id(template) not in self._installed:
                    replace_linears(template, formats, self._computing, self._dtype)
                    self._installed.add(id(template))
        return templates

    @cached_property
    def _parts(self) -> tuple[Any, tuple[Any, ...]]:
        module, block = self._build()
        return module, _templates(block, self._formats)


def _templates(block: Any, formats: Sequence[Formats]) -> tuple[Any, ...]:
    """A block module for each block; one is shared by all blocks whose linears are stored alike."""
    made: list[tuple[Formats, Any]] = []
    templates = []
    for wanted in formats:
        known = next((module for found, module in made if found == wanted), None)
        if known is None:
            known = block if not made else copy.deepcopy(block)
            made.append((wanted, known))
        templates.append(known)
    return tuple(templates)
