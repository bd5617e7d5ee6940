"""Networks without weights, built when a job first needs one: torch, diffusers and transformers
take seconds to load, and a plan or a refusal needs none of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from penstock.formats.formats import QuantFormat
from penstock.quant.paths import Computing

Formats = Mapping[str, QuantFormat]


class Skeleton:
    """A network of one component. One job at a time uses it, and the first builds it.

    Args:
        make: gives a network on the meta device and its one block.
        component: which network.
        config: the network's own.
        formats: of the quantised linears of each block.
        deltas: what LoRAs add, outside the blocks and then block by block; empty without LoRAs.
        tag: safetensors tag of the dtype it computes in.
    """

    def __init__(
        self,
        make: Callable[[str, Mapping[str, Any]], tuple[Any, Any]],
        component: str,
        config: Mapping[str, Any],
        formats: tuple[Formats, ...],
        deltas: Sequence[Any],
        tag: str,
    ) -> None:
        self._make, self._component, self._config = make, component, config
        self._formats, self._tag = formats, tag
        self._deltas = deltas
        self._computing: Computing | None = None
        self._installed: set[int] = set()

    def install(self, computing: Computing) -> None:
        """Let quantised linears and LoRAs compute so, once they are made. The first call counts."""
        self._computing = self._computing or computing

    @property
    def module(self) -> Any:
        """The network."""
        return self._ready[0]

    @property
    def templates(self) -> tuple[Any, ...]:
        """The block module of each block, quantised linears in it as its files store them."""
        return self._ready[1]

    @property
    def _ready(self) -> tuple[Any, tuple[Any, ...]]:
        module, templates = self._parts
        if self._computing is not None and not self._installed:
            for place, part in enumerate((module, *templates)):
                if id(part) not in self._installed:
                    self._put(place, part, self._computing)
                    self._installed.add(id(part))
        return module, templates

    def _put(self, place: int, part: Any, computing: Computing) -> None:
        from penstock.engine.model.binding import equip

        formats = self._formats[place - 1] if place else {}
        deltas = self._deltas[place] if self._deltas else {}
        equip(part, formats, deltas, computing, self._tag)

    @cached_property
    def _parts(self) -> tuple[Any, tuple[Any, ...]]:
        module, block = self._make(self._component, self._config)
        added = self._deltas[1:] or [{}] * len(self._formats)
        return module, _templates(block, list(zip(self._formats, added, strict=True)))


def _templates(block: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    """Return a block module for each block; one is shared by all blocks of a kind: whose linears
    are stored alike and bear the same LoRAs."""
    made: list[tuple[Any, Any]] = []
    templates = []
    for wanted in kinds:
        known = next((module for found, module in made if found == wanted), None)
        if known is None:
            known = block if not made else copy.deepcopy(block)
            made.append((wanted, known))
        templates.append(known)
    return tuple(templates)
