"""The commands about files of weights, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from penstock.cli import app
from penstock.engine.jobs import launch_settings
from tests.engine import golden
from tests.engine.test_doors import single_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert run.exit_code == 0, run.stderr
    assert f"--model {folder}" in run.stdout
    assert call("verify", folder).exit_code == 0
    run = call("generate", "--model", folder, *REQUEST, "-o", tmp_path / "x.mp4", "--json")
    assert run.exit_code == 0, run.stderr
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = call("verify", folder)
    assert run.exit_code == 1
    assert f"damaged: {path}" in run.stdout


def test_generate_and_resume_with_single_files(tmp_path: Path, model: Path) -> None:
    files = single_files(model, tmp_path)
    flags = ["--transformer", files.transformer, "--text-encoder", files.text_encoder, "--vae",
             files.vae, "--tokenizer", files.tokenizer]  # fmt: skip
    run = call("generate", *flags, *REQUEST, "-o", tmp_path / "x.mp4", "--job", tmp_path / "job")
    assert run.exit_code == 0, run.stderr
    launch = launch_settings(tmp_path / "job")
    assert launch.model is None
    assert launch.options["files"] == files
    assert call("resume", tmp_path / "job").exit_code != 0  # it is done
    run = call("generate", *flags[2:], *REQUEST, "-o", tmp_path / "y.mp4")
    assert run.exit_code == 2
    assert "--transformer" in run.stderr


def test_an_unknown_format_is_bad_usage(tmp_path: Path, model: Path) -> None:
    run = call("pack", "--model", model, "--format", "int3", "-o", tmp_path / "p")
    assert run.exit_code == 2
    assert "int3" in run.stderr
    assert not (tmp_path / "p").exists()
