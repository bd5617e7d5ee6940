"""What a family tells of the models that are made on the spot to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from penstock.engine.family.protocol import ComponentKind, families
from penstock.errors import UsageError


@dataclass(frozen=True)
class Synthetic:
    """A model that can be made on the spot.

    Attributes:
        kind: of the network that streams.
        streamed: its config.
    """

    kind: ComponentKind
    streamed: Mapping[str, Any]

    def config(self, blocks: int | None) -> dict[str, Any]:
        """Return the config of the network that streams, with another number of blocks if one is
        given."""
        whole = int(self.streamed["num_layers"])
        if blocks is not None and not 1 <= blocks <= whole:
            raise UsageError(
                "illegal number of blocks", expected=f"1 to {whole}", found=str(blocks)
            )
        return dict(self.streamed) | {"num_layers": whole if blocks is None else blocks}

    def write_rest(self, folder: Path, seed: int) -> None:
        """Write a whole model folder in diffusers' layout, around any network that streams."""
        raise NotImplementedError


class SyntheticFamily(Protocol):
    """What a family's module ``family`` offers to this room, beside `Family`."""

    def synthetics(self) -> Mapping[str, Synthetic]:
        """Return the models that can be made on the spot, by name."""


def synthetic(name: str) -> Synthetic:
    """Return the model called ``name``.

    Raises:
        UsageError: there is none.
    """
    found = {
        each: model
        for family in cast("tuple[SyntheticFamily, ...]", families())
        for each, model in family.synthetics().items()
    }
    if name not in found:
        raise UsageError(
            "no such synthetic model", expected="one of " + ", ".join(found), found=repr(name)
        )
    return found[name]
