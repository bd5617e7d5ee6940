"""Hostile files: each is refused in one line, or is harmless; none ends the process, takes long or
takes much memory, and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from penstock.engine.families.wan.tiny import write_tiny_model
from tests.engine.conftest import SMALL_VAE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", seed=1, vae=SMALL_VAE)


def outcomes(base: Path, folder: Path, first: int, last: int) -> Counter[tuple[str, str]]:
    """Number of cases by area and outcome; fails with the first that went wrong, and its number."""
    folder.mkdir()
    own = {"PENSTOCK_DATA_DIR": str(folder / "data"), "PENSTOCK_CACHE": str(folder / "cache"),
           "OMP_NUM_THREADS": "1", "COLUMNS": "100"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", base, folder, str(first), str(last)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | own,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"ended in {told[-1:]} by {done.returncode}: {done.stderr[-2000:]}"
    found = [each for each in told if "done" in each]
    assert [each["done"] for each in found] == list(range(first, last))
    wrong = [each for each in found if each["outcome"].startswith("wrong")]
    assert not wrong, f"{len(wrong)} wrong, the first {wrong[0]['done']}: {wrong[0]['outcome']}"
    return Counter((each["area"], each["outcome"]) for each in found)


def told(found: Counter[tuple[str, str]]) -> str:
    refused = sum(count for (_, outcome), count in found.items() if outcome == "refused")
    areas = sorted({area for area, _ in found})
    return (
        f"{found.total()} cases ({', '.join(areas)}): {refused} refused in one line, the others"
        " harmless; 0 tracebacks, 0 aborts, 0 over 5 s, 0 over 1 GiB, 0 files left"
    )


def test_two_hundred_hostile_files(base: Path, tmp_path: Path) -> None:
    found = outcomes(base, tmp_path / "cases", 0, 200)
    print("\nhostile files: " + told(found))
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 100


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_hostile_files_in_full(base: Path, tmp_path: Path, part: int) -> None:
    found = outcomes(base, tmp_path / "cases", 1000 + 550 * part, 1000 + 550 * (part + 1))
    print(f"\nhostile files, part {part}: " + told(found))
    assert found.total() == 550
