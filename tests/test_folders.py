"""Where settings, jobs and packs are: the variable that names it, or the platform's place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows, get_win_folder_from_env_vars

from penstock import folders
from penstock.engine.run.jobs import jobs_directory, new_job_folder
from penstock.folders import cache_folder, config_folder, data_folder

PLATFORMS = {"linux": Unix, "darwin": MacOS, "win32": Windows}


def be(monkeypatch: pytest.MonkeyPatch, platform: str, **variables: str) -> None:
    """Let this be another platform, with these variables."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(folders, "PlatformDirs", PLATFORMS[platform])
    asked = "platformdirs.windows._RESOLVE_WIN_FOLDER"  # Windows itself, which says the same
    monkeypatch.setattr(asked, get_win_folder_from_env_vars)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("platform", "variables", "ending"),
    [
        ("linux", {"XDG_CONFIG_HOME": "/x"}, "/x/penstock"),
        ("linux", {}, ".config/penstock"),
        ("win32", {"APPDATA": "/roaming"}, "/roaming/penstock"),
        ("darwin", {}, "Library/Application Support/penstock"),
        ("linux", {"PENSTOCK_CONFIG": "/here"}, "/here"),
    ],
)
def test_where_settings_are(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: Mapping[str, str], ending: str
) -> None:
    be(monkeypatch, platform, **variables)
    assert config_folder().as_posix().endswith(ending)


def test_where_jobs_are(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PENSTOCK_DATA_DIR", str(tmp_path))
        assert data_folder() == tmp_path and jobs_directory() == tmp_path / "jobs"
        assert new_job_folder().parent == tmp_path / "jobs"
    for platform, variables, expected in (
        ("linux", {"XDG_DATA_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "penstock"),
        ("linux", {"XDG_DATA_HOME": "relative"}, home / ".local" / "share" / "penstock"),
        ("win32", {"LOCALAPPDATA": str(tmp_path / "local")}, tmp_path / "local" / "penstock"),
        ("darwin", {}, home / "Library" / "Application Support" / "penstock"),
    ):
        with monkeypatch.context() as patched:
            be(patched, platform, **variables)
            assert data_folder() == expected


def test_where_packs_are(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PENSTOCK_CACHE", "/data/packs")
        assert cache_folder() == Path("/data/packs")
    for platform, variables, expected in (
        ("linux", {}, home / ".cache"),
        ("linux", {"XDG_CACHE_HOME": "/c"}, Path("/c")),
        ("win32", {"LOCALAPPDATA": str(tmp_path)}, tmp_path),
        ("darwin", {}, home / "Library" / "Caches"),
    ):
        with monkeypatch.context() as patched:
            be(patched, platform, **variables)
            assert cache_folder() == expected / "penstock" / "packs"


def test_a_tilde_is_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", "~/packs")
    assert cache_folder() == home / "packs"


@pytest.mark.parametrize(
    ("platform", "variables", "before"),
    [
        ("darwin", {"XDG_CONFIG_HOME": "/x"}, "Library/Application Support"),
        ("win32", {}, "moved"),
    ],
)
def test_what_a_user_has_from_before_stays_in_use(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    variables: Mapping[str, str],
    before: str,
) -> None:
    be(monkeypatch, platform, **variables)
    if platform == "win32":  # where the system says something else than the variable
        monkeypatch.setenv("WIN_PD_OVERRIDE_APPDATA", r"C:\Roaming")
        monkeypatch.setenv("APPDATA", str(home / before))
    place = config_folder()
    assert home not in place.parents
    (home / before / "penstock").mkdir(parents=True)
    assert config_folder() == home / before / "penstock"
    monkeypatch.setattr(folders.Path, "is_dir", lambda path: True)
    assert config_folder() == place, "once there is the platform's own, it counts"
