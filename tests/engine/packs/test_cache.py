"""The cache of packs: a list, and removal of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.packs.cache import (
    ABOUT,
    being_changed,
    cached_packs,
    remove_pack,
)
from penstock.errors import JobLocked, UsageError

WHOLE = f"wan2.1-t2v-14b-int8-{'0' * 16}"
STOPPED = f"wan2.1-t2v-14b-fp8-{'1' * 16}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A finished pack, one that was stopped, and what is not ours."""
    for name in (WHOLE, STOPPED):
        (tmp_path / "c" / name / "transformer").mkdir(parents=True)
        (tmp_path / "c" / name / "transformer" / "x.safetensors.new").write_bytes(b"123")
    (tmp_path / "c" / WHOLE / ABOUT).write_text('{"source": "/models/wan"}')
    (tmp_path / "c" / "users-own-folder").mkdir()
    return tmp_path / "c"


def test_packs_are_listed(tmp_path: Path, cache: Path) -> None:
    assert cached_packs(tmp_path / "nothing") == []
    stopped, whole = cached_packs(cache)
    assert (stopped.name, stopped.complete, stopped.source, stopped.nbytes) == (
        STOPPED,
        False,
        "",
        3,
    )
    assert (whole.name, whole.complete, whole.source, whole.nbytes) == (
        WHOLE, True, "/models/wan", 3 + len('{"source": "/models/wan"}'),
    )  # fmt: skip
    (cache / WHOLE / ABOUT).write_text("damaged")
    assert cached_packs(cache)[1].source == ""


def test_a_pack_is_removed_and_nothing_else(tmp_path: Path, cache: Path) -> None:
    for name in ("users-own-folder", "../c", "", str(tmp_path)):
        with pytest.raises(UsageError, match="no such pack"):
            remove_pack(cache, name)
    assert remove_pack(cache, STOPPED) == 3
    assert sorted(path.name for path in cache.iterdir()) == ["users-own-folder", WHOLE]


def test_a_pack_in_the_making_stays(cache: Path) -> None:
    with being_changed(cache / STOPPED), pytest.raises(JobLocked, match=STOPPED):
        remove_pack(cache, STOPPED)
    assert remove_pack(cache, STOPPED) > 0
