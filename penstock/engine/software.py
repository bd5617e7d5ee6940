"""Which versions of what are installed."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from penstock._version import __version__
from penstock.errors import UsageError

LEAST: Mapping[str, str] = MappingProxyType({
    "torch": "2.7", "numpy": "1.26", "safetensors": "0.6.1", "diffusers": "0.36",
    "transformers": "4.57.1", "tokenizers": "0.22", "pillow": "10.3",
})  # fmt: skip
"""The lowest versions of what every job imports, as pyproject.toml declares them."""

LEAST_TO_WRITE: Mapping[str, str] = MappingProxyType({"av": "14"})
"""Likewise of what a job imports that writes a file."""


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    packages = ("penstock", "torch", "diffusers", "transformers", "safetensors", "av")
    return {"python": platform.python_version()} | {
        name: package_version(name) for name in packages
    }


def package_version(package: str) -> str:
    """Return the version of an installed package; "absent" where there is none."""
    if package == "penstock":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:  # a benchmark runs without the video encoder, for one
        return "absent"


def check_versions(least: Mapping[str, str] = LEAST) -> None:
    """Refuse libraries that are too old now, where else an import or a call would fail in the
    middle of a job.

    Raises:
        UsageError: one is older than ``least`` says, or absent.
    """
    for package, lowest in least.items():
        found = package_version(package)
        if found == "absent" or _numbers(found) < _numbers(lowest):
            raise UsageError(
                f"the installed {package} cannot be used",
                expected=f"{package}>={lowest}",
                found=found,
                remedy=f'pip install "{package}>={lowest}"',
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Return a release's numbers: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
