"""Power loss: every on-disk state that may be found after it.

The model is harsher than POSIX demands of any file system. Until a file is synced, each of its
writes may be on the disk, missing (zeros in its place), torn or overwritten with junk, and its size
may lag. Until a folder is synced, any subset of the changes of its entries may be on the disk. A
rename is atomic, but the old name may linger. A synced file and a synced entry stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

Log = list[tuple[str, Path, Any]]
Disk = dict[str, bytes]

_SUBSET_LIMIT = 6
"""Above this many pending changes only those subsets are taken that lack one or keep a prefix."""


@dataclass
class _File:
    synced: bytes = b""
    writes: list[bytes] = field(default_factory=list)

    def variants(self) -> set[bytes]:
        """Every content that may be on the disk."""
        if not self.writes:
            return {self.synced}
        found = set()
        for kept in _subsets(len(self.writes)):
            parts = [w if k else bytes(len(w)) for w, k in zip(self.writes, kept, strict=True)]
            found.add(self.synced + b"".join(parts))
        for index, data in enumerate(self.writes):
            before = self.synced + b"".join(self.writes[:index])
            cuts = {len(data) * eighth // 8 for eighth in range(8)} | {len(data) - 1}
            for cut in cuts:
                found.add(before + data[:cut])  # the size lags
                found.add(before + data[:cut] + bytes(len(data) - cut))  # the content lags
            found.add(before + b"\xa5" * len(data) + b"".join(self.writes[index + 1 :]))
        return found


def _subsets(count: int) -> Iterator[tuple[bool, ...]]:
    if count <= _SUBSET_LIMIT:
        yield from product((False, True), repeat=count)
        return
    for index in range(count + 1):
        yield tuple(position < index for position in range(count))
        yield tuple(position != index for position in range(count))


@dataclass
class _Folder:
    """Entries that are on the disk for certain, and changes that may be."""

    entries: dict[str, _File] = field(default_factory=dict)
    pending: list[tuple[str, str, _File | None]] = field(default_factory=list)

    def now(self) -> dict[str, _File]:
        """The entries as a running process sees them."""
        return self._applied([True] * len(self.pending), lingering=False)

    def variants(self) -> Iterator[dict[str, _File]]:
        """Every set of entries that may be on the disk."""
        for kept in _subsets(len(self.pending)):
            yield self._applied(kept, lingering=False)
            if any(change == "rename" for change, _, _ in self.pending):
                yield self._applied(kept, lingering=True)

    def _applied(self, kept: Iterable[bool], *, lingering: bool) -> dict[str, _File]:
        entries = dict(self.entries)
        for (change, names, file), keep in zip(self.pending, kept, strict=True):
            if not keep:
                continue
            source, _, target = names.partition("\0")
            if change == "unlink" or (change == "rename" and not lingering):
                entries.pop(source, None)
            if file is not None:
                entries[target or source] = file
        return entries


def states_after(log: Log, folder: Path) -> Iterator[tuple[int, Disk]]:
    """For every length of the log, every distinct state of ``folder`` that may be on the disk.

    Yields:
        How many operations had been issued, and the files with their contents.
    """
    disk = _Folder()
    for count, (operation, path, extra) in enumerate(log, 1):
        if path == folder or path.parent == folder:
            _issue(disk, operation, path, extra)
        seen = set()
        for entries in disk.variants():
            for contents in product(*(sorted(file.variants()) for file in entries.values())):
                state = tuple(sorted(zip(entries, contents, strict=True)))
                if state not in seen:
                    seen.add(state)
                    yield count, dict(state)


def _issue(disk: _Folder, operation: str, path: Path, extra: Any) -> None:
    now = disk.now()
    if operation == "fsync_dir":
        disk.entries, disk.pending = now, []
    elif operation == "create":
        disk.pending.append(("create", path.name, _File()))
    elif operation == "unlink" and path.name in now:
        disk.pending.append(("unlink", path.name, None))
    elif operation == "rename":
        disk.pending.append(("rename", f"{path.name}\0{extra.name}", now[path.name]))
    elif operation == "write":
        now[path.name].writes.append(extra)
    elif operation == "fsync":
        file = now[path.name]
        file.synced, file.writes = file.synced + b"".join(file.writes), []
