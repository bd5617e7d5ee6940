"""``penstock bench`` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from penstock.cli.bench_view import sections, tables
from penstock.cli.main import app
from penstock.engine.bench.result import load
from tests import fake_kitchen
from tests.cli.widths import hold

SMALL = ["--synthetic", "tiny", "--blocks", "2", "--width", "32", "--height", "32",
         "--frames", "5", "--steps", "2", "--device", "cpu"]  # fmt: skip


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "result.json"
    done = _call(*SMALL, "--save", path, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["recipe_hash"] == load(path).recipe.hash
    return path


def test_the_table_says_it_all(kept: Path) -> None:
    done = _call(*SMALL, "--compare", kept, "--seconds", "1000")
    assert done.exit_code == 0, done.output
    for word in ("seconds a step", "overlap", "ceiling", "peaks", "PASS", "disk -> host"):
        assert word in done.stdout, word


def test_markdown(kept: Path) -> None:
    done = _call(*SMALL, "--md")
    assert done.exit_code == 0
    assert "| phase | seconds | predicted |" in done.stdout


def test_a_regression_is_an_exit_code(kept: Path, tmp_path: Path) -> None:
    fast = json.loads(kept.read_text())
    for step in fast["steps"]:
        step["seconds"] = 1e-6
    path = tmp_path / "fast.json"
    path.write_text(json.dumps(fast))
    done = _call(*SMALL, "--compare", path, "--seconds", "0", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["verdict"]["outcome"] == "REGRESSION"


def test_another_recipe_is_an_exit_code(kept: Path) -> None:
    done = _call(*SMALL, "--cfg", "1", "--compare", kept)
    assert done.exit_code == 2
    assert "RECIPE_MISMATCH" in done.stdout


def test_another_attention_is_another_recipe(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch)
    done = _call(*SMALL, "--attention", "int8", "--compare", kept, "--json")
    assert done.exit_code == 2, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["verdict"]["outcome"] == "RECIPE_MISMATCH"
    assert found["recipe"]["compute"].endswith(", int8 attention")
    assert load(kept).recipe.compute == found["recipe"]["compute"].partition(",")[0]
    assert found["latents_sha256"] != load(kept).latents_sha256
    assert any("int8 attention: it works here" in told for told in found["notices"])
    fake_kitchen.install(monkeypatch, available=False)
    done = _call(*SMALL, "--attention", "int8", "--compare", kept, "--seconds", "1000")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "int8 attention: not here, torch's own attends (it needs a CUDA device)" in shown


def test_a_bad_file_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{}")
    done = _call(*SMALL, "--compare", path)
    assert done.exit_code == 2
    assert "no saved benchmark" in done.stderr
    assert "making" not in done.stderr


def test_a_sweep_draws(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    done = _call(*SMALL, "--sweep", picture, "--profiles", "4gb,8gb", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["profile"] for row in rows] == ["4gb", "8gb"]
    assert all(row["result"]["median_s"] > 0 for row in rows)
    assert Image.open(picture).size == (900, 560)


def test_a_call_without_a_model_is_wrong() -> None:
    done = _call()
    assert done.exit_code == 2
    assert "--model PATH or --synthetic NAME" in done.stderr


def test_the_tables_fit_a_terminal(kept: Path) -> None:
    shown = sections(load(kept))
    hold(lambda width: tables(shown, width))
