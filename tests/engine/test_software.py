"""A library that is too old, or absent, is one line before anything is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.engine import software
from penstock.engine.engine import Engine
from penstock.engine.media.video import check_output
from penstock.engine.software import LEAST, LEAST_TO_WRITE, check_versions
from penstock.errors import UsageError

ROOT = Path(__file__).parents[2]


def stated(text: str, mark: str) -> dict[str, str]:
    found = re.findall(rf"^\W*([A-Za-z0-9-]+){mark}([0-9.]+)", text, re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_they_are_those_that_are_declared() -> None:
    declared = stated((ROOT / "pyproject.toml").read_text(), ">=")
    for package, lowest in {**LEAST, **LEAST_TO_WRITE}.items():
        assert declared[package] == lowest


def test_the_lowest_that_are_declared_are_those_that_are_tested() -> None:
    """But for torch, as the file says."""
    tested = stated((ROOT / "constraints-lowest.txt").read_text(), "==")
    declared = stated((ROOT / "pyproject.toml").read_text(), ">=")
    for package, lowest in declared.items():
        if package in tested and package != "torch":
            assert (tested[package] + ".0.0").startswith(lowest + "."), package
    assert set(LEAST) | set(LEAST_TO_WRITE) <= set(tested)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(**versions: str) -> None:
        real = software.package_version
        monkeypatch.setattr(
            software, "package_version", lambda name: versions.get(name) or real(name)
        )

    return pretend


@pytest.mark.parametrize("version", ["4.57", "4.57.0", "3.99.99", "absent", ""])
def test_an_old_one_is_refused(installed: Callable[..., None], version: str) -> None:
    installed(transformers=version or "unknown")
    with pytest.raises(UsageError, match=r"transformers>=4\.57\.1") as caught:
        check_versions()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["4.57.1", "4.58", "5.0.0rc1", "10.0"])
def test_newer_ones_pass(installed: Callable[..., None], version: str) -> None:
    installed(transformers=version)
    check_versions()


def test_before_a_model_is_run_and_before_a_file_is_promised(
    installed: Callable[..., None], t2v_folder: Path, tmp_path: Path
) -> None:
    installed(av="13.1", diffusers="0.35.2")
    with pytest.raises(UsageError, match=r"diffusers>=0\.36"):
        Engine.open(t2v_folder, device="cpu")
    with pytest.raises(UsageError, match="av>=14"):
        check_output(tmp_path / "x.mp4")
