"""What is shipped: every file that the package needs, under one version."""

from __future__ import annotations

import fnmatch
import re
import sys
from pathlib import Path
from typing import Any

from penstock import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "penstock"


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shipped(name: str, patterns: list[str]) -> bool:
    """Whether a file of the package goes into a wheel; ``**`` is any depth, as for setuptools."""
    return name.endswith(".py") or any(
        fnmatch.fnmatchcase(name, pattern.replace("**/", "")) for pattern in patterns
    )


def test_every_file_of_the_package_is_shipped() -> None:
    patterns = settings()["tool"]["setuptools"]["package-data"]["penstock"]
    files = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [name for name in files if not shipped(name, patterns)] == []
    assert not shipped("serve/other/x.html", patterns)


def test_every_folder_of_modules_is_a_package() -> None:
    """`packages.find` passes over folders without an ``__init__.py``."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_one_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_extras_are_told() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    extras = settings()["project"]["optional-dependencies"]
    assert [name for name in extras if f"`penstock[{name}]`" not in page] == []
