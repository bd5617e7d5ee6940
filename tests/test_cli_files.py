"""The commands about files of weights, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from penstock.cli import app
from penstock.engine.jobs import launch_settings
from tests.engine import golden


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


REQUEST = ("--prompt", "x", "--size", "48x32", "--frames", "5", "--steps", "1", "--cfg", "1",
           "--device", "cpu", "--ram", "256MiB", "--vram", "256MiB")  # fmt: skip


def test_inspect_says_what_it_is_and_how_to_use_it(model: Path) -> None:
    run = call("inspect", model)
    assert run.exit_code == 0
    assert f"penstock generate --model {model}" in run.stdout
    found = json.loads(call("inspect", model / "transformer", "--json").stdout)
    assert found["components"][0]["format"] == "bf16"
    assert call("inspect", model / "tokenizer").exit_code != 0


def test_pack_verify_generate(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "packed"
    run = call("pack", "--model", model, "--format", "int8", "-o", folder)
    assert run.exit_code == 0 and f"--model {folder}" in run.stdout
    assert call("verify", folder).exit_code == 0
    run = call("generate", "--model", folder, *REQUEST, "-o", tmp_path / "x.mp4", "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["report"]["weight_format"] == "int8"
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = call("verify", folder)
    assert run.exit_code == 1 and f"damaged: {path}" in run.stdout


def test_generate_in_a_format_packs_into_the_cache(tmp_path: Path, model: Path) -> None:
    assert call("cache", "ls").stdout.strip() == "no packs"
    parts = ("--transformer", model / "transformer", "--model", model)
    options = ("--format", "nf4", "--compute", "fast", "--job", tmp_path / "job", "--json")
    run = call("generate", *parts, *options, *REQUEST, "-o", tmp_path / "x.mp4")
    assert run.exit_code == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])["report"]
    assert report["weight_format"] == "nf4" and report["compute"].startswith("fast")
    (pack,) = json.loads(call("cache", "ls", "--json").stdout)
    assert pack["whole"] and pack["source"] == str(model / "transformer")
    assert pack["name"] in call("cache", "ls").stdout
    launch = launch_settings(tmp_path / "job")
    assert launch.model == str(model)
    assert launch.options["format"] == "nf4" and launch.options["compute"] == "fast"
    assert launch.options["files"].transformer == model / "transformer"
    assert call("cache", "rm", "other").exit_code != 0
    assert call("cache", "rm", "nf4").exit_code == 0
    assert not Path(pack["folder"]).exists()


@pytest.mark.parametrize("flags", [("--format", "int3"), ("--compute", "quick")])
def test_unknown_names_are_refused(tmp_path: Path, model: Path, flags: tuple[str, str]) -> None:
    run = call("generate", "--model", model, *flags, *REQUEST, "-o", tmp_path / "x.mp4")
    assert run.exit_code == 2
    assert flags[1] in run.stderr


def test_generate_without_a_model_is_refused(tmp_path: Path) -> None:
    run = call("generate", *REQUEST, "-o", tmp_path / "x.mp4")
    assert run.exit_code == 2 and "no model" in run.stderr
