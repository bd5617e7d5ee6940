"""Folders of the tests' own, and one torch thread: the tensors here are tiny, and sums then do not
depend on the machine."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The gate tries the same cases each time; new ones are sought everywhere else.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")

_POINTERS = (
    "PENSTOCK_CONFIG", "PENSTOCK_CACHE", "PENSTOCK_DATA_DIR",
    "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME",
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE",
)  # fmt: skip
"""Variables that lead to a user's folders past the home."""

_SIZES = ("COLUMNS", "LINES")
"""Of a terminal: readline sets them in pytest's process, whose workers inherit them."""

_PICTURES = ("TERM_PROGRAM", "KITTY_WINDOW_ID")
"""Of terminals that show pictures: what is drawn does not depend on where the tests are run."""


def pytest_configure(config: pytest.Config) -> None:
    """A home of the run's own, before anything is imported that looks at the real one: what the
    user of this machine has measured, packed or kept must not decide whether a test passes."""
    home = tempfile.TemporaryDirectory(prefix="penstock-tests-")
    patch = pytest.MonkeyPatch()
    config.add_cleanup(home.cleanup)
    config.add_cleanup(patch.undo)
    for name in (*_POINTERS, *_SIZES, *_PICTURES):
        patch.delenv(name, raising=False)
    move_home(patch, Path(home.name))


def move_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Let ``home`` be where this process, and those that it starts, look for a user's folders."""
    for name in ("HOME", "USERPROFILE"):
        patch.setenv(name, str(home))
    for name, place in (("APPDATA", "Roaming"), ("LOCALAPPDATA", "Local")):
        patch.setenv(name, str(home / "AppData" / place))
    for name, place in (("APPDATA", "Roaming"), ("LOCAL_APPDATA", "Local")):
        patch.setenv(f"WIN_PD_OVERRIDE_{name}", str(home / "AppData" / place))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of this test alone, inside the run's: nothing of it is found by the next."""
    folder = Path(tempfile.mkdtemp(dir=Path.home()))
    move_home(monkeypatch, folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


_LIBRARY_MODULES = 100
"""So many modules more are a library: its objects are many, and stay."""

_frozen = [0]


@pytest.fixture(autouse=True, scope="module")
def _libraries_are_no_garbage() -> None:
    """What was imported is not looked through at each collection. An engine collects when it
    closes, which with torch, transformers and diffusers loaded takes half a second."""
    if len(sys.modules) - _frozen[-1] >= _LIBRARY_MODULES:
        gc.collect()
        gc.freeze()
        _frozen.append(len(sys.modules))
