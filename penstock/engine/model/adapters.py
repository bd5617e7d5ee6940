"""Odd tensors made to fit: parameters that a file stores in another type than the network computes
in, and tables that are read by rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.engine.files.formats import decode, is_linear
from penstock.engine.files.keys import ComponentSource, stored_name
from penstock.engine.files.storage import StoredWeight, as_bytes
from penstock.formats.tags import ITEM_BYTES
from penstock.offload.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLOAT32_TOO = "scale_shift_table"
"""A table that is added in fp32 where it is stored so, whatever the network computes in."""
_SINGLE = "F32"


@dataclass(frozen=True)
class Odd:
    """A parameter that is not stored as it is computed with.

    Attributes:
        stored: how it is stored.
        shape: its logical shape.
        tag: safetensors tag of the dtype that it becomes.
    """

    stored: StoredWeight
    shape: tuple[int, ...]
    tag: str

    @property
    def nbytes(self) -> int:
        """Of what it becomes."""
        return math.prod(self.shape) * ITEM_BYTES[self.tag]


@dataclass(frozen=True)
class Adapter:
    """Casts or decodes the odd parameters among the tensors of one block (or of the rest).

    Attributes:
        odd: each odd parameter, by its local name.
    """

    odd: Mapping[str, Odd]

    def peak_bytes(self, device: str) -> int:
        """Return what the made tensors take beside the stored ones, and making the last of them, on
        a device of that type."""
        made = sum(odd.nbytes for odd in self.odd.values())
        decoding = (
            odd.stored.format.workspace_bytes((odd.shape[0], odd.shape[1]), device)
            for odd in self.odd.values()
            if not odd.stored.plain and len(odd.shape) == 2
        )
        return made + max(decoding, default=0)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``tensors`` with the odd ones replaced; those of other runs may be absent."""
        if not self.odd:
            return tensors
        made = dict(tensors)
        for name, odd in self.odd.items():
            names = {suffix: stored_name(name, suffix) for suffix in odd.stored.tensors}
            if all(full in made for full in names.values()):
                parts = {suffix: made.pop(full) for suffix, full in names.items()}
                made[name] = decode(odd.stored, parts, odd.shape, torch_dtype(odd.tag))
        return made


def adapters_of(
    source: ComponentSource, prefix: str, count: int, only: tuple[str, ...], tag: str
) -> tuple[Adapter, ...]:
    """Return the adapter of the rest, then one a block."""
    shapes = source.shapes
    odd: list[dict[str, Odd]] = [{} for _ in range(count + 1)]
    for name, stored in source.weights.items():
        in_block = bool(prefix) and name.startswith(prefix)
        kept = in_block and is_linear(name, shapes[name]) and not stored.plain
        wanted = _SINGLE if source.kind.keeps_single(name) else tag
        if kept or _fits(name, stored, wanted) or name.startswith("shared."):
            continue
        found = Odd(stored, shapes[name], wanted)
        number, _, local = name[len(prefix) :].partition(".")
        if not in_block and name.startswith(only):
            odd[0][name] = found
        elif in_block and int(number) < count:
            odd[int(number) + 1][local] = found
    return tuple(Adapter(each) for each in odd)


def _fits(name: str, stored: StoredWeight, tag: str) -> bool:
    """Return whether the network computes with the parameter as it is stored."""
    if not stored.plain:
        return False
    found = stored.tensors["weight"].dtype
    return found == tag or (found == _SINGLE and name.endswith(_FLOAT32_TOO))


def read_table_rows(
    source: ComponentSource,
    checkpoint: Checkpoint,
    name: str,
    rows: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the rows of a table in ``dtype``: of each stored tensor just those rows are read.

    Raises:
        CheckpointError: no format reads it.
    """
    stored, shape = source.weights[name], source.shapes[name]
    tensors = {}
    for suffix, entry in stored.tensors.items():
        full = stored_name(name, suffix)
        by_row = as_bytes(entry).shape[:1] == shape[:1]
        tensors[suffix] = checkpoint.read_rows(full, rows) if by_row else checkpoint.read(full)
    return decode(stored, tensors, (len(rows), *shape[1:]), dtype)
