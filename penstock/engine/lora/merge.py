"""LoRAs folded into weights as a pack is made: the values a reader gives already hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.files.reader import WeightReader
from penstock.engine.lora.place import Change, PlacedLoras, delta_of
from penstock.offload.checkpoint import Checkpoint


class MergedReader(WeightReader):
    """A `WeightReader` whose values hold LoRAs: added in fp32, then rounded once.

    Args:
        loras: one or more, with the component they belong to.
    """

    def __init__(self, loras: PlacedLoras) -> None:
        super().__init__(loras.source)
        self._changes: dict[str, list[Change]] = {}
        for change in loras.changes():
            self._changes.setdefault(change.parameter, []).append(change)
        self._loras = Checkpoint(loras.files[0].path, loras.entries(), loras.stamps, {})
        self._stack.enter_context(self._loras)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """As `WeightReader.read`, merged."""
        if name not in self._changes:
            return super().read(name, dtype)
        merged = super().read(name, torch.float32)
        for change in self._changes[name]:
            parts = [self._loras.read(tensor) for tensor in change.tensors]
            merged.add_(delta_of(parts, merged.shape), alpha=change.scale)
        return merged.to(dtype)

    def read_rows(self, name: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """As `WeightReader.read_rows`, merged."""
        if name not in self._changes:
            return super().read_rows(name, first, last, dtype)
        merged = super().read_rows(name, first, last, torch.float32)
        for change in self._changes[name]:
            rows, *others = change.tensors
            parts = [self._loras.read_rows(rows, range(first, last))]
            parts += [self._loras.read(tensor) for tensor in others]
            merged.add_(delta_of(parts, merged.shape), alpha=change.scale)
        return merged.to(dtype)

    def check_unchanged(self) -> None:
        """As `WeightReader.check_unchanged`, for the LoRAs' files too."""
        super().check_unchanged()
        self._loras.check_unchanged()
