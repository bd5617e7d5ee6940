"""Bytes of packs, compared with their checksums as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.engine.files.source import RawFile
from penstock.engine.files.storage import PACK_METADATA
from penstock.engine.packs.file import PackFile, PackRun, damaged, running_digest
from penstock.offload.checkpoint import TensorEntry
from penstock.offload.files import WeightFile
from penstock.offload.layout import BlockLayout

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Placed:
    """A run of a pack and where a block's buffer holds it."""

    path: Path
    run: PackRun
    buffer_offset: int


class RunInspector:
    """As `penstock.offload.layout.Inspector`: each run of a block against its checksum."""

    def __init__(self, placed: Sequence[Placed]) -> None:
        self._runs = [(each, running_digest()) for each in placed]

    def feed(self, view: memoryview, position: int) -> None:
        """Bytes of the buffer, from ``position`` on."""
        for placed, state in self._runs:
            first = max(placed.buffer_offset, position)
            last = min(placed.buffer_offset + placed.run.nbytes, position + len(view))
            if first < last:
                state.update(view[first - position : last - position])

    def finish(self) -> None:
        """All bytes were fed.

        Raises:
            CheckpointError: they are not those that were packed; names the file and the run.
        """
        for placed, state in self._runs:
            if state.digest() != placed.run.checksum:
                raise damaged(placed.path, placed.run.name)


@dataclass(frozen=True)
class Packs:
    """The packs among the files of a component: their runs by first byte, by path."""

    runs: Mapping[Path, Mapping[int, PackRun]]

    @classmethod
    def of(cls, raw: RawFile) -> Packs:
        """Return those of ``raw``; none if another program made it.

        Raises:
            CheckpointError: a pack's header or sums are damaged.
        """
        paths = raw.stamps if PACK_METADATA in raw.metadata else ()
        return cls(
            {path: {r.offset: r for r in PackFile.open(path).runs.values()} for path in paths}
        )

    def checked(self, layout: BlockLayout) -> BlockLayout:
        """Return ``layout``, its bytes looked at where they come from a pack.

        Raises:
            CheckpointError: the pack holds these tensors in other runs than are read.
        """
        placed = [
            Placed(each.file, self._run(each.file, each.file_offset, each.nbytes),
                   each.buffer_offset)
            for each in layout.extents
            if each.file in self.runs
        ]  # fmt: skip
        return replace(layout, inspector=lambda: RunInspector(placed)) if placed else layout

    def _run(self, path: Path, offset: int, nbytes: int) -> PackRun:
        run = self.runs[path].get(offset)
        if run is None or run.nbytes != nbytes:
            raise damaged(path, f"the run at byte {offset:,}")
        return run

    def verify(self, entry: TensorEntry) -> None:
        """Read the run that holds ``entry``, if a pack does, and compare it with its checksum.

        Raises:
            CheckpointError: they differ, or no run holds it.
        """
        if entry.file in self.runs:
            _verify(entry, self._run_around(entry))

    def _run_around(self, entry: TensorEntry) -> PackRun:
        start, stop = entry.offset, entry.offset + entry.nbytes
        for run in self.runs[entry.file].values():
            if run.offset <= start and stop <= run.offset + run.nbytes:
                return run
        raise damaged(entry.file, entry.name)


def _verify(entry: TensorEntry, run: PackRun) -> None:
    inspector = RunInspector([Placed(entry.file, run, 0)])
    buffer = memoryview(bytearray(min(_PIECE_BYTES, run.nbytes)))
    with WeightFile(entry.file, entry.stamp) as file:
        for start in range(0, run.nbytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, run.nbytes - start)]
            file.read_into(piece, run.offset + start)
            inspector.feed(piece, start)
    inspector.finish()
