"""Where penstock keeps what is a user's: settings, jobs, packs. The platform's places, unless the
environment names others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from platformdirs import PlatformDirs

_BEFORE = {
    "darwin": {"cache": "~/Library/Caches", "": "~/Library/Application Support"},
    "win32": {"config": "$APPDATA", "": "$LOCALAPPDATA"},
}
"""Where version 0.1 looked, if that may be elsewhere: it knew no XDG variables on macOS, and asked
variables, not the system, on Windows."""


def config_folder() -> Path:
    """Return a user's own profiles and measured rates: ``$PENSTOCK_CONFIG``, or the platform's
    place."""
    return _named("PENSTOCK_CONFIG") or _kept("config", _places(roaming=True).user_config_path)


def data_folder() -> Path:
    """Return the jobs: ``$PENSTOCK_DATA_DIR``, or the platform's place."""
    return _named("PENSTOCK_DATA_DIR") or _kept("data", _places().user_data_path)


def cache_folder() -> Path:
    """Return the packs made on first use: ``$PENSTOCK_CACHE``, or a folder in the platform's
    place."""
    return _named("PENSTOCK_CACHE") or _kept("cache", _places().user_cache_path) / "packs"


def _named(variable: str) -> Path | None:
    found = os.environ.get(variable)
    return Path(found).expanduser() if found else None


def _places(*, roaming: bool = False) -> PlatformDirs:
    return PlatformDirs("penstock", appauthor=False, roaming=roaming, opinion=False)


def _kept(kind: str, place: Path) -> Path:
    """Return ``place``, or what a user has from an earlier version while ``place`` is not there."""
    known = _BEFORE.get(sys.platform, {})
    base = known.get(kind, known.get(""))
    if base is None or place.is_dir():
        return place
    before = Path(os.path.expandvars(base)).expanduser() / "penstock"
    return before if before.is_dir() else place
