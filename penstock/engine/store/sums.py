"""Checksums of every byte of a file, and when one that was taken before may still be believed.

A file of many gigabytes is read whole once. What is known of it then holds as long as all that
tells of a change without reading it agrees: size, time of the last write (mtime) and of the last
change of any kind (ctime, which programs cannot set), inode, device, and samples of its content.
Where one of them differs the file is read again. Two changes within a tick of the file system's
clock leave the same times: what was taken so soon after a change is not believed either.

Checksums are XXH3-128 (https://xxhash.com): what is guarded against is change, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.engine.store.digest import reading, stamp
from penstock.engine.store.durable import FileOps, read_whole, write_atomically
from penstock.errors import CheckpointChanged, JournalError
from penstock.folders import data_folder
from penstock.units import format_bytes

SETTLED_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT: two seconds)."""

PIECE_BYTES = 1 << 20
"""Of a file at a time, in memory."""

_ATTEMPTS = 3


@dataclass(frozen=True)
class Identity:
    """What tells a file from a changed one without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return that in a stat result."""
        return cls(
            status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
        )

    def is_older_than(self, moment_ns: int) -> bool:
        """Return whether the last change lies clearly before ``moment_ns``. On Windows ctime is the
        time of creation, and mtime has to do."""
        changed_ns = self.mtime_ns if os.name == "nt" else self.ctime_ns
        return moment_ns - changed_ns > SETTLED_NS


@dataclass(frozen=True)
class FileSum:
    """The bytes of a file as they are now.

    Attributes:
        value: of all of them, in hex: XXH3-128, of a small file SHA-256.
        read_bytes: how many were read to tell; 0: what was known before is believed.
    """

    value: str
    read_bytes: int


class Sums:
    """Checksums of whole files that are known on this machine.

    Args:
        folder: where they are kept, a small file each; None: in the data directory.
        ops: the file operations.
    """

    def __init__(self, folder: Path | None = None, ops: FileOps | None = None) -> None:
        self._folder = folder or data_folder() / "sums"
        self._ops = ops or FileOps()

    def known(self, path: Path) -> FileSum | None:
        """Return the checksum of ``path`` where one may be believed; a small file is simply read.

        Raises:
            StorageError: it cannot be read.
        """
        content = stamp(path)
        if "samples_sha256" not in content:
            return FileSum(content["sha256"], content["bytes"])
        with reading(path):
            identity = Identity.of(path.stat())
        note = self._note(path)
        try:
            same = Identity(**note["identity"]) == identity and note["content"] == content
            believed = same and identity.is_older_than(note["taken_ns"])
            return FileSum(str(note["xxh3_128"]), 0) if believed else None
        except (KeyError, TypeError):
            return None

    def of(self, path: Path, check: Callable[[], None] = lambda: None) -> FileSum:
        """Return the checksum of ``path``: one that may be believed, or of its bytes, read now.

        Args:
            path: the file.
            check: called between pieces; what it raises ends the reading.

        Raises:
            StorageError: it cannot be read.
            CheckpointChanged: it does not keep still.
        """
        for _ in range(_ATTEMPTS):
            known = self.known(path)
            if known is not None:
                return known
            taken_ns, content = time.time_ns(), stamp(path)
            before, sum_, after = _read(path, check)
            if before == after and stamp(path) == content:
                self._keep(path, after, content, sum_, taken_ns)
                return FileSum(sum_, after.size)
        raise CheckpointChanged(
            f"{path} changes while it is read",
            expected="a file that does not change",
            found="different times or bytes at each read",
            remedy="Let downloads and copies finish, and start again.",
        )

    def _note(self, path: Path) -> dict[str, Any]:
        try:
            blob = read_whole(self._ops, self._place(path))
            value = json.loads(blob or b"{}")
        except (JournalError, ValueError, RecursionError):
            return {}  # it is taken again
        return value if isinstance(value, dict) else {}

    def _keep(
        self, path: Path, identity: Identity, content: Mapping[str, Any], sum_: str, taken_ns: int
    ) -> None:
        note = {
            "path": str(path.absolute()), "identity": asdict(identity), "content": content,
            "xxh3_128": sum_, "taken_ns": taken_ns,
        }  # fmt: skip
        place = self._place(path)
        try:
            self._ops.mkdir(place.parent)
            write_atomically(self._ops, place, [json.dumps(note).encode()], str(os.getpid()))
        except (OSError, JournalError):
            return  # where nothing can be kept, the file is read again the next time

    def _place(self, path: Path) -> Path:
        name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        return self._folder / f"{name}.json"


def _read(path: Path, check: Callable[[], None]) -> tuple[Identity, str, Identity]:
    import xxhash  # with the first file that is read whole

    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with reading(path), path.open("rb", buffering=0) as file:
        before = Identity.of(os.fstat(file.fileno()))
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            check()
        return before, state.hexdigest(), Identity.of(os.fstat(file.fileno()))


def how_told(sums: Iterable[FileSum]) -> str:
    """Return how files were compared, in words."""
    found = list(sums)
    read = [each.read_bytes for each in found if each.read_bytes]
    believed = len(found) - len(read)
    parts = []
    if believed:
        parts.append(f"{believed} by size, times, inode, device and samples")
    if read:
        parts.append(f"{len(read)} by every byte ({format_bytes(sum(read))} read)")
    return " and ".join(parts) or "none"
