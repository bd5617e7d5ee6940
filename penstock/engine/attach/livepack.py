"""Weights of a living module written to a pack, and read back into it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import xxhash
from torch import Tensor

from penstock.engine.packs.file import PackLayout, digest, lay_out, sums_text
from penstock.engine.packs.layout import Spec
from penstock.engine.packs.pack import as_memory
from penstock.engine.store.durable import FileOps, storing
from penstock.errors import UsageError
from penstock.folders import cache_folder
from penstock.offload.checkpoint import Checkpoint, TensorEntry
from penstock.quant.values.tensors import DTYPES

_WRITE_BYTES = 8 << 20
_FOLDER = "live"
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()} | {torch.float64: "F64"}


def spec_of(tensor: Tensor, name: str) -> Spec:
    """Return the dtype tag and shape of a tensor, as a pack states them.

    Raises:
        UsageError: a dtype or a kind of tensor that is not streamed; names it.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.dtype not in _TAGS or tensor.is_meta:
        found = f"{type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
        raise UsageError(
            f"{name} cannot be streamed",
            expected="a plain dense tensor of " + ", ".join(map(str, _TAGS)) + ", with its values",
            found=found,
            remedy="Stream the module before it is quantised, sharded or compiled by others",
        )
    return _TAGS[tensor.dtype], tuple(tensor.shape)


@contextmanager
def live_folder(base: Path | None) -> Iterator[Path]:
    """Provide a new folder for packs of living modules, removed at the end.

    What processes that were killed have left is removed too.

    Args:
        base: where; None: in the cache folder, which is on a disk (``/tmp`` may be RAM).

    Raises:
        StorageError: it cannot be made.
    """
    ops, base = FileOps(), cache_folder() if base is None else base
    with storing(ops, base):
        ops.mkdir(base)
        for name in ops.names(base):
            kind, _, rest = name.partition(".")
            owner = rest.partition(".")[0]
            if kind == _FOLDER and owner.isdigit() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(base / name)
        folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}.{os.getpid()}.", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def plan_live(specs: Mapping[str, Mapping[str, Spec]]) -> PackLayout:
    """Return where everything goes in a pack of ``specs``: dtype tag and shape of each tensor, by
    run (what is read at once) and name."""
    return lay_out(specs, {"component": "live", "gguf": {}})


class LivePack:
    """Weights of this process in a file: written once, streamed from, read back.

    Args:
        path: a new file.
        layout: from `plan_live`.
        tensors: gives the tensors of a run in the order of its names; each is needed only until
            the next is asked for.

    Raises:
        StorageError: the disk is full (seen before anything is written) or fails.
    """

    def __init__(
        self,
        path: Path,
        layout: PackLayout,
        tensors: Callable[[str], Iterator[Tensor]],
    ) -> None:
        ops = FileOps()
        self._runs = {run.name: run for run in layout.runs}
        with storing(ops, path, layout.file_bytes):
            if ops.free_bytes(path.parent) < layout.file_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            descriptor = ops.create(path)
            try:
                self._sums = _write(_Writer(ops, descriptor), layout, tensors)
            finally:
                ops.close(descriptor)
        self._checkpoint = Checkpoint.open(path)

    def entries(self, run: str) -> dict[str, TensorEntry]:
        """Return the places of the tensors of a run, by name."""
        return {place.name: self._checkpoint[place.name] for place in self._runs[run].tensors}

    def read(self, run: str) -> tuple[dict[str, Tensor], bool]:
        """Read the tensors of a run in new memory, and whether they are those that were written.

        Raises:
            CheckpointChanged: the file was truncated or touched.
        """
        state, tensors = xxhash.xxh3_128(), {}
        end = self._runs[run].offset
        for place in self._runs[run].tensors:
            tensor = self._checkpoint.read(place.name)
            state.update(bytes(place.offset - end))
            state.update(as_memory(tensor))
            tensors[place.name] = tensor
            end = place.offset + place.nbytes
        return tensors, state.digest() == self._sums[run]

    def close(self) -> None:
        """Close the file."""
        self._checkpoint.close()


class _Writer:
    """Appends to a file and keeps the checksum of what was appended since `begin`."""

    def __init__(self, ops: FileOps, descriptor: int) -> None:
        self._ops, self._descriptor = ops, descriptor
        self.position, self.sum = 0, xxhash.xxh3_128()

    def begin(self, position: int) -> None:
        self.pad_to(position)
        self.sum = xxhash.xxh3_128()

    def pad_to(self, position: int) -> None:
        self.append(memoryview(bytes(position - self.position)))

    def append(self, data: memoryview) -> None:
        done = 0
        while done < data.nbytes:
            done += self._ops.write(self._descriptor, data[done : done + _WRITE_BYTES])
        self.sum.update(data)
        self.position += data.nbytes


def _write(
    out: _Writer, layout: PackLayout, tensors: Callable[[str], Iterator[Tensor]]
) -> dict[str, bytes]:
    out.append(memoryview(layout.header))
    sums = {}
    for run in layout.runs:
        out.begin(layout.data_start + run.offset)
        for place, tensor in zip(run.tensors, tensors(run.name), strict=True):
            out.pad_to(layout.data_start + place.offset)
            out.append(as_memory(tensor.detach().cpu()))
        sums[run.name] = out.sum.digest()
    out.pad_to(layout.data_start + layout.sums_offset)
    out.append(memoryview(sums_text(digest(layout.header), list(sums.values()))))
    return sums
