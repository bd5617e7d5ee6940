"""Which versions of what are installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from penstock._version import __version__


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("penstock", "torch", "diffusers", "transformers", "safetensors", "av")
    return {"python": platform.python_version()} | {
        name: package_version(name) for name in packages
    }


def package_version(package: str) -> str:
    """Of an installed package; "absent" where there is none."""
    if package == "penstock":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:  # a benchmark runs without the video encoder, for one
        return "absent"
