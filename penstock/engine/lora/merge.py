"""LoRAs folded into weights as a pack is made: the values a reader gives already hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.files.reader import WeightReader
from penstock.engine.lora.place import Change, PlacedLoras
from penstock.offload.checkpoint import Checkpoint


class MergedReader(WeightReader):
    """A `WeightReader` whose values hold LoRAs: changed in fp32, and rounded by who reads them.

    Args:
        loras: one or more, with the component they belong to.
    """

    def __init__(self, loras: PlacedLoras) -> None:
        super().__init__(loras.source)
        self._changes: dict[str, list[Change]] = {}
        for change in loras.changes():
            self._changes.setdefault(change.parameter, []).append(change)
        first = loras.files[0].file
        self._loras = Checkpoint(first.path, loras.entries(), loras.stamps, {})
        self._stack.enter_context(self._loras)

    def value_dtype(self, name: str) -> torch.dtype:
        """As `WeightReader.value_dtype`; what is changed comes in fp32."""
        return torch.float32 if name in self._changes else super().value_dtype(name)

    def has_rows(self, name: str) -> bool:
        """As `WeightReader.has_rows`; a LoRA may mix rows, or need all of them."""
        alone = all(change.patch.by_rows for change in self._changes.get(name, ()))
        return alone and super().has_rows(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """As `WeightReader.read`, merged."""
        if name not in self._changes:
            return super().read(name, dtype)
        merged = super().read(name, torch.float32)
        for change in self._changes[name]:
            change.apply(merged, {tensor: self._loras.read(tensor) for tensor in change.tensors})
        return merged.to(dtype)

    def read_rows(self, name: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """As `WeightReader.read_rows`, merged."""
        if name not in self._changes:
            return super().read_rows(name, first, last, dtype)
        merged = super().read_rows(name, first, last, torch.float32)
        for change in self._changes[name]:
            tensors = {
                tensor: self._loras.read_rows(tensor, range(first, last))
                if role in ("diff", "set")
                else self._loras.read(tensor)
                for role, tensor in zip(change.patch.roles, change.tensors, strict=True)
            }
            change.apply(merged, tensors, first)
        return merged.to(dtype)

    def check_unchanged(self) -> None:
        """As `WeightReader.check_unchanged`, for the LoRAs' files too."""
        super().check_unchanged()
        self._loras.check_unchanged()
