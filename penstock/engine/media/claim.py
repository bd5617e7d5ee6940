"""The name of a video, reserved while its job runs: a second job is refused at its start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from penstock.engine.store.lock import JobLock
from penstock.errors import JobLocked, OutputError, StorageError
from penstock.folders import data_folder


class OutputClaim:
    """Held from construction to :meth:`release`; the system drops it with the process.

    It lies in the data directory: nothing appears in the user's folder before the video. Where that
    directory cannot be written there is no claim, and the last step of a job decides alone.

    Args:
        output: path of the mp4.

    Raises:
        OutputError: another job is to write that file.
    """

    def __init__(self, output: Path) -> None:
        folder = data_folder() / "outputs"
        name = hashlib.sha256(os.fsencode(os.path.realpath(output))).hexdigest()[:32]
        self._lock: JobLock | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = JobLock(folder / f"{name}.lock")
        except JobLocked as error:
            raise OutputError(
                "another job is already writing this file",
                expected="an output that no running job writes",
                found=f"{output}, which {error.found} is about to make",
                remedy="Choose another name, or wait for that job",
            ) from error
        except (OSError, StorageError):
            return

    def release(self) -> None:
        """Let others have the name. May be called twice."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            lock.remove()
        except OSError:
            return  # the lock is let go all the same; its file is a few bytes
