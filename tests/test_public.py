"""The package's face: its names, and that importing it does nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import penstock


def test_all_names_are_there() -> None:
    assert all(getattr(penstock, name) is not None for name in penstock.__all__)
    assert set(penstock._HOMES) | {"__version__"} == set(penstock.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        penstock.nothing_like_this  # noqa: B018


def test_importing_loads_neither_torch_nor_the_engine() -> None:
    code = "import sys, penstock; print(sorted({'torch', 'penstock.engine'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
