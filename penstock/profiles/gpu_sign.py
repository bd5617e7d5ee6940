"""Signs of a GPU that torch may compute on, looked for without loading a driver.

Only torch can say whether there is one, and it takes seconds to import: it is asked where a sign is
found. A sign without a GPU costs those seconds, a GPU without a sign would lie idle: so whatever a
driver leaves on a machine counts, and one sign is enough.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_FILES = (
    "proc/driver/nvidia",
    "dev/nvidiactl",
    "dev/dxg",
    "usr/lib/wsl/lib/libcuda.so.1",
    "dev/kfd",
)
"""On Linux, of NVIDIA's driver (in a container perhaps only its device), of WSL, and of AMD's, for
which torch says "cuda" too."""

_LIBRARY = "libcuda.so.1"
"""NVIDIA's driver library: where it is installed, the kernel's part may be loaded by its first use
(and a Jetson's is elsewhere)."""

_DLLS = ("nvcuda.dll", "atiadlxx.dll")
"""On Windows, of NVIDIA's and AMD's drivers."""


def shows_gpu(
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    platform: str = sys.platform,
) -> bool:
    """Return whether this machine shows a sign of a GPU.

    Args:
        root: of the file system (another one in tests).
        environ: the environment; None takes the process's own.
        platform: as `sys.platform` names it.
    """
    environ = os.environ if environ is None else environ
    if platform == "win32":
        system = Path(environ.get("SYSTEMROOT", r"C:\Windows")) / "System32"
        return any((system / name).exists() for name in _DLLS)
    if platform != "linux":
        return False
    folders = [Path(each) for each in environ.get("LD_LIBRARY_PATH", "").split(":") if each]
    places = [root / name for name in _FILES] + [each / _LIBRARY for each in folders]
    return any(place.exists() for place in places) or _LIBRARY.encode() in _loader_cache(root)


def _loader_cache(root: Path) -> bytes:
    """Return what the dynamic loader finds without being told where: names and paths, among
    others."""
    try:
        return (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return b""
