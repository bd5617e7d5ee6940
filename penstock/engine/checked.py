"""Bytes of packs, compared with their checksums as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from penstock.engine.keys import ComponentSource
from penstock.engine.packfile import PackFile, PackRun, damaged
from penstock.engine.storage import PACK_METADATA
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
        self._runs = [(each, xxhash.xxh3_128()) for each in placed]
        self._position = 0

    def feed(self, view: memoryview) -> None:
        """The next bytes of the buffer, front to back."""
        start = self._position
        self._position += len(view)
        for placed, state in self._runs:
            first = max(placed.buffer_offset, start)
            last = min(placed.buffer_offset + placed.run.nbytes, self._position)
            if first < last:
                state.update(view[first - start : last - start])

    def finish(self) -> None:
        """All bytes were fed.

        Raises:
            CheckpointError: they are not those that were packed; names the file and the run.
        """
        for placed, state in self._runs:
            if state.digest() != placed.run.checksum:
                raise damaged(placed.path, placed.run.name)


class Packs:
    """The packs among the files of a component; none for files of other makers.

    Attributes:
        runs: by first byte, by path.

    Raises:
        CheckpointError: a pack's header or sums are damaged.
    """

    def __init__(self, source: ComponentSource) -> None:
        paths = source.raw.stamps if PACK_METADATA in source.raw.metadata else ()
        self.runs = {
            path: {run.offset: run for run in PackFile.open(path).runs.values()} for path in paths
        }

    def checked(self, layout: BlockLayout) -> BlockLayout:
        """``layout``, its bytes looked at where they come from a pack.

        Raises:
            CheckpointError: the pack holds these tensors in other runs than we read.
        """
        placed = [
            Placed(extent.file, self._run(extent.file, extent.file_offset, extent.nbytes),
                   extent.buffer_offset)
            for extent in layout.extents
            if extent.file in self.runs
        ]  # fmt: skip
        return replace(layout, inspector=lambda: RunInspector(placed)) if placed else layout

    def _run(self, path: Path, offset: int, nbytes: int) -> PackRun:
        run = self.runs[path].get(offset)
        if run is None or run.nbytes != nbytes:
            raise damaged(path, f"the run at byte {offset:,}")
        return run

    def verify(self, name: str) -> None:
        """Read the runs called ``name`` and compare them with their checksums.

        Raises:
            CheckpointError: they differ.
        """
        for path, runs in self.runs.items():
            for run in runs.values():
                if run.name == name:
                    _verify(path, run)


def _verify(path: Path, run: PackRun) -> None:
    inspector = RunInspector([Placed(path, run, 0)])
    buffer = memoryview(bytearray(min(_PIECE_BYTES, run.nbytes)))
    with WeightFile(path) as file:
        for start in range(0, run.nbytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, run.nbytes - start)]
            file.read_into(piece, run.offset + start)
            inspector.feed(piece)
    inspector.finish()
