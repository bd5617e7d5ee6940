"""The frames of a finished mp4, as one number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av


def frames_sha(path: Path) -> str:
    """SHA-256 over the decoded frames."""
    sha = hashlib.sha256()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            sha.update(frame.to_ndarray().tobytes())
    return sha.hexdigest()
