"""Where penstock keeps what is to stay: jobs, and what it knows of the files on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data_directory() -> Path:
    """penstock's folder for data, by the platform's convention; PENSTOCK_DATA_DIR overrides it."""
    override = os.environ.get("PENSTOCK_DATA_DIR")
    if override:
        return Path(override)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "penstock"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "penstock"
    # https://specifications.freedesktop.org/basedir-spec/: a relative path is to be ignored
    shared = os.environ.get("XDG_DATA_HOME", "")
    base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".local" / "share"
    return base / "penstock"
