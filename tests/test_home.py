"""The tests never read or write what the user of this machine keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.packs.cache import cached_packs
from penstock.engine.run.jobs import jobs_directory, list_jobs
from penstock.folders import cache_folder, config_folder
from penstock.profiles.hardware import probe

AT_IMPORT = Path.home()
"""As modules and fixtures of a wider scope see it."""

LEADS = {
    "HOME": {"HOME": ""},
    "XDG": {
        "XDG_CONFIG_HOME": ".config",
        "XDG_DATA_HOME": ".local/share",
        "XDG_CACHE_HOME": ".cache",
    },
    "PENSTOCK": {
        "PENSTOCK_CONFIG": ".config/penstock",
        "PENSTOCK_DATA_DIR": ".local/share/penstock",
        "PENSTOCK_CACHE": ".cache/penstock/packs",
    },
}  # fmt: skip
KEPT = {
    ".config/penstock/rates.json": "not rates",
    ".local/share/penstock/jobs/one/job-0.json": "not a job",
    ".cache/penstock/packs/wan-0123456789abcdef/pack.json": "not a pack",
}


def folders() -> tuple[Path, ...]:
    return config_folder(), jobs_directory(), cache_folder()


def test_nothing_of_a_user_is_found(home: Path) -> None:
    assert all(home in folder.parents for folder in folders())
    assert AT_IMPORT in home.parents
    assert probe("cpu").rates_source == "assumed"
    assert list_jobs() == [] == cached_packs(cache_folder())


@pytest.mark.parametrize("lead", LEADS)
def test_whatever_a_user_keeps(lead: str, tmp_path: Path) -> None:
    """The test before this one passes where there are rates (that cannot even be read), a job and
    a pack, wherever the environment leads."""
    for name, content in KEPT.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    pointers = {name: str(tmp_path / place) for name, place in LEADS[lead].items()}
    test = f"{__file__}::{test_nothing_of_a_user_is_found.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=os.environ | pointers, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_child_processes_look_where_the_test_does() -> None:
    code = "from tests.test_home import folders; print(*folders(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(folder) for folder in folders()]


@pytest.mark.parametrize("turn", range(2))
def test_what_one_test_keeps_the_next_does_not_find(turn: int) -> None:
    assert not config_folder().exists()
    config_folder().mkdir(parents=True)
