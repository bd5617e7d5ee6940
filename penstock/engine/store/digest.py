"""A file known by its size and its hash, or by that of samples of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.errors import StorageError

SAMPLE_BYTES = 64 << 10
SAMPLES = 64
"""A file above `SAMPLES` x `SAMPLE_BYTES` is known by its size and so many evenly spread samples:
hashing 33 GB would take longer than opening it, and another fine-tune differs everywhere."""


def stamp(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file; of a large one, the SHA-256 of evenly spread samples.

    Raises:
        StorageError: it cannot be read.
    """
    sha = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        nbytes = path.stat().st_size
        if nbytes <= SAMPLES * SAMPLE_BYTES:
            sha.update(file.read())
            return {"bytes": nbytes, "sha256": sha.hexdigest()}
        for index in range(SAMPLES):
            file.seek(index * (nbytes - SAMPLE_BYTES) // (SAMPLES - 1))
            sha.update(file.read(SAMPLE_BYTES))
    return {"bytes": nbytes, "samples_sha256": sha.hexdigest()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be read", found=error.strerror) from error
