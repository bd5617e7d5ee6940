"""Parameters of a component read from its files, as stored bytes or as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from penstock.closing import Closing
from penstock.engine.files.formats import compute_tag, decode
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.storage import as_bytes
from penstock.offload.checkpoint import TensorEntry, torch_dtype, view_as_stored
from penstock.offload.files import WeightFile


class WeightReader(Closing):
    """Reads the parameters of a component, as stored bytes or as plain values.

    Args:
        source: the component; its `check` must pass.

    Attributes:
        dtype: to compute in, see `compute_tag`.
    """

    def __init__(self, source: ComponentSource) -> None:
        self._source, self._shapes = source, source.shapes
        self.dtype = torch_dtype(compute_tag(source))
        self._stack = ExitStack()
        self._files = {
            path: self._stack.enter_context(WeightFile(path, stamp))
            for path, stamp in source.raw.stamps.items()
        }

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read the values of the parameter ``name``.

        Raises:
            CheckpointError: no format reads it.
        """
        stored = self._source.weights[name]
        tensors = {s: self._tensor(as_bytes(entry)) for s, entry in stored.tensors.items()}
        return decode(stored, tensors, self._shapes[name], dtype)

    def value_dtype(self, name: str) -> torch.dtype:
        """Return what the values of the parameter are best read in before they are quantised."""
        return self.dtype

    def has_rows(self, name: str) -> bool:
        """Return whether rows of the parameter can be read alone."""
        return self._source.weights[name].format.by_rows

    def read_rows(self, name: str, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows ``first`` to ``last`` (exclusive) of a matrix of which `has_rows`
        holds."""
        stored, (count, columns) = self._source.weights[name], self._shapes[name]
        entries = {suffix: as_bytes(entry) for suffix, entry in stored.tensors.items()}
        tensors = {
            suffix: self._tensor(_rows(e, first, last) if e.shape[:1] == (count,) else e)
            for suffix, e in entries.items()
        }
        return decode(stored, tensors, (last - first, columns), dtype)

    def stored_bytes(self, name: str, suffix: str, chunk_bytes: int) -> Iterator[memoryview]:
        """Yield the bytes of a stored tensor; each piece is overwritten by the next."""
        entry = self._source.weights[name].tensors[suffix]
        buffer = memoryview(bytearray(min(chunk_bytes, entry.nbytes)))
        for start in range(0, entry.nbytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, entry.nbytes - start)]
            self._files[entry.file].read_into(piece, entry.offset + start)
            yield piece

    def _tensor(self, entry: TensorEntry) -> Tensor:
        flat = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._files[entry.file].read_into(flat.numpy().data, entry.offset)
        return view_as_stored(flat, entry.dtype, entry.shape)

    def check_unchanged(self) -> None:
        """Raise CheckpointChanged if a file was changed since its header was read."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def _rows(entry: TensorEntry, first: int, last: int) -> TensorEntry:
    row_bytes = entry.nbytes // entry.shape[0]
    return replace(
        entry,
        offset=entry.offset + first * row_bytes,
        shape=(last - first, *entry.shape[1:]),
        nbytes=(last - first) * row_bytes,
    )
