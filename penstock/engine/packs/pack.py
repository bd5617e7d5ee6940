"""Packing: a model of any origin becomes a folder in diffusers' layout whose weights are packs.

Each component is made parameter by parameter, so that a 33 GB model needs no more memory than a few
chunks of its matrices; each run is on the disk, and its checksum in a progress file, before the
next begins. A packing that was killed continues after the last sound run, and ends with the same
bytes as one that was not. What it was made from stands beside it, by checksums of every byte: a
pack, finished or not, of files that have changed since is made again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import torch
from torch import Tensor

from penstock.closing import Closing
from penstock.engine.files.experts import SECOND
from penstock.engine.files.keys import stored_name
from penstock.engine.files.locate import ModelSource
from penstock.engine.files.reader import WeightReader
from penstock.engine.lora.file import Lora
from penstock.engine.lora.merge import MergedReader
from penstock.engine.lora.place import PlacedLoras
from penstock.engine.packs.file import (
    PackFile,
    PackLayout,
    digest,
    running_digest,
    sums_text,
)
from penstock.engine.packs.layout import PlannedRun
from penstock.engine.packs.names import PROGRESS_SUFFIX
from penstock.engine.packs.origin import Origin, read_origin, write_origin
from penstock.engine.packs.plan import LEAST_RAM_BYTES, ComponentPlan, PackStep, plan_component
from penstock.engine.packs.side import write_side_files
from penstock.engine.packs.target import check_target
from penstock.engine.store.durable import NEW_SUFFIX, FileOps, read_whole, storing, write_atomically
from penstock.engine.store.sums import FileSum, Sums
from penstock.errors import CheckpointError, UsageError
from penstock.offload.checkpoint import torch_dtype
from penstock.quant.arithmetic import quantise

log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the component's name, the bytes made so far and their sum over all components."""

_WRITE_BYTES = 8 << 20
_SHARE = 16
"""A chunk's fp32 values take at most this part of the memory allowed: reading, decoding, rounding
and the result hold a few copies of it at once."""


@dataclass(frozen=True)
class PackReport:
    """What was made: the folder, its packs, their bytes, and the runs that were there already; and
    what is to be said of the files it was made from."""

    folder: Path
    files: int
    nbytes: int
    reused_runs: int
    notices: tuple[str, ...] = ()


def pack(
    source: ModelSource,
    wanted: str,
    folder: Path,
    *,
    loras: Sequence[Lora] = (),
    ram_bytes: int = 2 << 30,
    ops: FileOps | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write ``source`` to ``folder`` as packs, or continue an attempt that was stopped.

    Args:
        wanted: format of the transformer's block matrices; the other components keep theirs.
        loras: folded into the transformer's weights before they are quantised.
        ram_bytes: most memory for the weights in work, `LEAST_RAM_BYTES` or more.
        ops: the file operations.
        progress: told of every piece.

    Raises:
        UsageError: no such format, too little memory, or a folder of somebody's files.
        CheckpointError: the source is not whole, changed meanwhile, or holds NaN or Inf; a LoRA
            cannot be used, or was made for another model.
        StorageError: the disk is full (seen before anything is written) or fails.
    """
    if ram_bytes < LEAST_RAM_BYTES:
        raise UsageError(
            "too little memory to pack", expected=f"{LEAST_RAM_BYTES:,} bytes", found=str(ram_bytes)
        )
    ops = ops or FileOps()
    second = source.parts.get(SECOND)
    merged = PlacedLoras.open(source.streamed, loras, source.lora_folders, second)
    by_part = {part.source.component: part for part in merged.every}
    plans = [
        plan_component(part, wanted, by_part.get(part.component)) for part in source.components()
    ]
    check_target(folder, plans)
    check_space(ops, folder, plans)
    total = sum(plan.layout.file_bytes for plan in plans)
    done = reused = 0
    for plan in plans:
        report = _reporter(progress, plan.source.component, done, total)
        reused += pack_component(plan, folder / plan.file, ram_bytes, ops, report)
        done += plan.layout.file_bytes
    named = {"loras": merged.merged_names()} if merged.files else {}
    write_side_files(source, folder, {"format": wanted, **named}, ops)
    notices = (*source.notes, *merged.notices)
    return PackReport(folder, len(plans), total, reused, notices)


def _reporter(progress: Progress | None, name: str, base: int, total: int) -> Callable[[int], None]:
    def report(nbytes: int) -> None:
        if progress is not None:
            progress(name, base + nbytes, total)

    return report


def check_space(ops: FileOps, folder: Path, plans: Sequence[ComponentPlan]) -> None:
    """Make ``folder``, if its disk has room for what ``plans`` still lack.

    Raises:
        StorageError: it has not.
    """
    need = 0
    for plan in plans:
        path = folder / plan.file
        there = max(ops.size(path), ops.size(_partial(path)))
        need += max(0, plan.layout.file_bytes - there)
    with storing(ops, folder / "packs", need):
        place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if ops.free_bytes(place) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ops.mkdir(folder)


def origin_sums(
    plan: ComponentPlan, check: Callable[[], None], sums: Sums | None = None
) -> dict[str, FileSum]:
    """Return the checksums of all that the pack of ``plan`` is made from; read where none may be
    believed.

    Raises:
        StorageError: a file cannot be read.
        CheckpointChanged: one does not keep still.
    """
    sums = sums or Sums()
    return {name: sums.of(path, check) for name, path in plan.origins().items()}


def _partial(path: Path) -> Path:
    return path.with_name(path.name + NEW_SUFFIX)


def pack_component(
    plan: ComponentPlan,
    path: Path,
    ram_bytes: int,
    ops: FileOps,
    report: Callable[[int], None],
) -> int:
    """Make one pack; gives the number of runs that were there already.

    Raises:
        CheckpointError, StorageError: as `pack`.
    """
    notes = path.with_name(path.name + PROGRESS_SUFFIX)
    made_from = {name: each.value for name, each in origin_sums(plan, lambda: report(0)).items()}
    with storing(ops, path, plan.layout.file_bytes):
        ops.mkdir(path.parent)
        reused = len(plan.layout.runs)
        if not (_is_finished(path, plan.layout) and read_origin(ops, path) == made_from):
            reused = _write_pack(plan, path, notes, made_from, ram_bytes, ops, report)
        ops.unlink(notes)
    report(plan.layout.file_bytes)
    return reused


def _write_pack(
    plan: ComponentPlan,
    path: Path,
    notes: Path,
    made_from: Origin,
    ram_bytes: int,
    ops: FileOps,
    report: Callable[[int], None],
) -> int:
    layout, partial = plan.layout, _partial(path)
    sums = _sound_runs(ops, partial, notes, layout, made_from)
    reused = len(sums)
    log.info("%s: %d of %d runs are there already", path, reused, len(layout.runs))
    with _reader(plan) as reader, _Output(ops, partial, layout, reused) as out:
        for run, steps in list(zip(layout.runs, plan.steps, strict=True))[reused:]:
            sums.append(_write_run(out, run, steps, reader, ram_bytes // _SHARE, report))
            out.sync()
            write_atomically(ops, notes, [_notes(layout, made_from, sums)])
        reader.check_unchanged()
        out.pad_to(layout.sums_offset)
        out.write(sums_text(digest(layout.header), sums))
        out.sync()
    write_origin(ops, path, partial, made_from)
    ops.rename(partial, path)
    ops.fsync_dir(path.parent)
    return reused


def _reader(plan: ComponentPlan) -> WeightReader:
    """Read the values that are packed."""
    return MergedReader(plan.loras) if plan.loras.files else WeightReader(plan.source)


def _is_finished(path: Path, layout: PackLayout) -> bool:
    """Return whether ``path`` is this very pack already."""
    if not path.exists() or path.stat().st_size != layout.file_bytes:
        return False
    try:
        PackFile.open(path)
    except CheckpointError:
        return False
    with path.open("rb") as file:
        return file.read(layout.data_start) == layout.header


def _notes(layout: PackLayout, made_from: Origin, sums: list[bytes]) -> bytes:
    head = digest(layout.header).hex()
    runs = [each.hex() for each in sums]
    return json.dumps({"header": head, "source": dict(made_from), "runs": runs}).encode()


def _sound_runs(
    ops: FileOps, partial: Path, notes: Path, layout: PackLayout, made_from: Origin
) -> list[bytes]:
    """Return the checksums of the runs that an earlier attempt at the same files has left whole,
    from the first on."""
    content = read_whole(ops, notes)
    known = [] if content is None else _noted(content, layout, made_from)
    sound: list[bytes] = []
    if not known or ops.size(partial) < layout.data_start:
        return sound
    with partial.open("rb") as file:
        if file.read(layout.data_start) != layout.header:
            return sound
        for run, expected in zip(layout.runs, known, strict=False):
            if _file_digest(file, layout.data_start + run.offset, run.nbytes) != expected:
                break
            sound.append(expected)
    return sound


def _noted(content: bytes, layout: PackLayout, made_from: Origin) -> list[bytes]:
    try:
        notes = json.loads(content)
        same = notes["header"] == digest(layout.header).hex() and notes["source"] == made_from
        return [bytes.fromhex(text) for text in notes["runs"]] if same else []
    except (ValueError, RecursionError, KeyError, TypeError):
        return []  # damaged notes: nothing is known to be sound, and all is made again


def _file_digest(file: IO[bytes], offset: int, nbytes: int) -> bytes:
    state = running_digest()
    file.seek(offset)
    left = nbytes
    while left and (piece := file.read(min(_WRITE_BYTES, left))):
        state.update(piece)
        left -= len(piece)
    return state.digest()


class _Output(Closing):
    """The pack being written: only ever appended to. Positions count from the start of the data."""

    def __init__(self, ops: FileOps, path: Path, layout: PackLayout, runs: int) -> None:
        self._ops, self._path, self._hash = ops, path, running_digest()
        self.position = 0
        if runs:
            self.position = layout.runs[runs - 1].offset + layout.runs[runs - 1].nbytes
            ops.truncate(path, layout.data_start + self.position)
            self._descriptor = ops.append(path)
        else:
            ops.unlink(path)
            self._descriptor = ops.create(path)
            self.write(layout.header)
            self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data).cast("B")
        done = 0
        while done < view.nbytes:
            done += self._ops.write(self._descriptor, view[done : done + _WRITE_BYTES])
        self._hash.update(view)
        self.position += view.nbytes

    def pad_to(self, position: int) -> None:
        """Append zeros up to ``position``."""
        self.write(bytes(position - self.position))

    def begin(self) -> None:
        """Start the checksum anew."""
        self._hash = running_digest()

    def checksum(self) -> bytes:
        """Return the checksum of everything since `begin`."""
        return self._hash.digest()

    def sync(self) -> None:
        """Return when all of it is on the disk; if that fails the file is given up, for what the
        system still shows of it may never have been written."""
        try:
            self._ops.fsync(self._descriptor)
        except OSError:
            self._ops.unlink(self._path)
            raise

    def close(self) -> None:
        """Close the file."""
        self._ops.close(self._descriptor)


def _write_run(
    out: _Output,
    run: PlannedRun,
    steps: tuple[PackStep, ...],
    reader: WeightReader,
    chunk_bytes: int,
    report: Callable[[int], None],
) -> bytes:
    places = {tensor.name: tensor.offset for tensor in run.tensors}
    out.pad_to(run.offset)
    out.begin()
    last = ""
    for step in steps:
        for suffix, piece in _pieces(step, reader, chunk_bytes):
            name = stored_name(step.name, suffix)
            if name != last:
                out.pad_to(places[name])
                last = name
            out.write(piece)
            report(out.position)
    return out.checksum()


def _pieces(
    step: PackStep, reader: WeightReader, chunk_bytes: int
) -> Iterator[tuple[str, memoryview]]:
    """Yield the bytes of a parameter's packed tensors, tensor by tensor, by suffix."""
    if step.kept:
        for suffix in step.made:
            for part in reader.stored_bytes(step.name, suffix, _WRITE_BYTES):
                yield suffix, part
        return
    if step.format is None:
        dtype = torch_dtype(step.made["weight"][0])
        for values in _chunks(step, reader, chunk_bytes, dtype):
            yield "weight", as_memory(values)
        return
    yield from _quantised(step, reader, chunk_bytes)


def _quantised(
    step: PackStep, reader: WeightReader, chunk_bytes: int
) -> Iterator[tuple[str, memoryview]]:
    """Yield the tensors' bytes: the first, the long one, goes out as it is made; the scales wait
    for its end."""
    assert step.format is not None
    first, *others = step.made
    waiting: dict[str, list[Tensor]] = {suffix: [] for suffix in others}
    for values in _chunks(step, reader, chunk_bytes, reader.value_dtype(step.name)):
        made = quantise(step.format, values, step.name)
        yield first, as_memory(made[first])
        for suffix in others:
            waiting[suffix].append(made[suffix])
    for suffix in others:
        for tensor in waiting[suffix]:
            yield suffix, as_memory(tensor)


def _chunks(
    step: PackStep, reader: WeightReader, chunk_bytes: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the parameter's values by runs of rows, or at once where it must or may be."""
    whole = step.format is not None and not step.format.by_rows
    if len(step.shape) != 2 or whole or not reader.has_rows(step.name):
        yield reader.read(step.name, dtype)
        return
    rows, columns = step.shape
    count = max(1, chunk_bytes // (4 * columns))
    for start in range(0, rows, count):
        yield reader.read_rows(step.name, start, min(rows, start + count), dtype)


def as_memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, in its order."""
    flat: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat
