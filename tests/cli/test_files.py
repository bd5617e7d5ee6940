"""The commands about files of weights, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.engine.run.jobs import opening_of
from tests.engine import golden
from tests.engine.test_doors import single_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))


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
    opening = opening_of(tmp_path / "job")
    assert opening.model is None
    assert opening.files == files
    assert call("resume", tmp_path / "job").exit_code != 0  # it is done
    run = call("generate", *flags[2:], *REQUEST, "-o", tmp_path / "y.mp4")
    assert run.exit_code == 2
    assert "--transformer" in run.stderr


def test_an_unknown_format_is_bad_usage(tmp_path: Path, model: Path) -> None:
    run = call("pack", "--model", model, "--format", "int3", "-o", tmp_path / "p")
    assert run.exit_code == 2
    assert "int3" in run.stderr
    assert not (tmp_path / "p").exists()


def report_of(run: Result) -> dict[str, Any]:
    assert run.exit_code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_generate_in_a_format_packs_into_the_cache(tmp_path: Path, model: Path) -> None:
    assert call("cache", "ls").stdout.strip() == "no packs"
    options = ("--format", "nf4", "--compute", "fast", "--job", tmp_path / "job", "--json")
    run = call("generate", "--model", model, *options, *REQUEST, "-o", tmp_path / "x.mp4")
    found = report_of(run)
    assert found["plan"]["phases"][0]["name"] == "pack"
    for part in (found["plan"], found["report"]):
        facts = (part["weight_format"], part["compute"], part["compute_path"])
        assert facts == ("nf4", "fast", "dequant")
    assert "blocks stored as nf4, compute fast: decoded" in run.stderr
    assert "packing the transformer as nf4" in run.stderr
    (pack,) = json.loads(call("cache", "ls", "--json").stdout)
    assert pack["complete"]
    assert pack["source"] == str(model / "transformer")
    assert pack["name"] in call("cache", "ls").stdout
    opening = opening_of(tmp_path / "job")
    assert (opening.options.format, opening.options.compute) == ("nf4", "fast")
    assert call("cache", "rm", "other").exit_code == 2
    assert call("cache", "rm", pack["name"]).exit_code == 0
    assert not Path(pack["folder"]).exists()


def test_plan_states_format_and_path_and_writes_nothing(tmp_path: Path, model: Path) -> None:
    here = ("plan", "--model", model, "--size", "48x32", "--frames", "5", "--json")
    cpu = (*here, "--device", "cpu", "--ram", "256MiB", "--vram", "256MiB")
    plan = report_of(call(*cpu, "--format", "int8", "--compute", "exact"))
    assert (plan["weight_format"], plan["compute_path"]) == ("int8", "dequant")
    card = (*here, "--card", "RTX 4090 24GB", "--ram", "32GiB", "--format", "fp8")
    for compute, path in (("exact", "dequant"), ("fast", "fp8")):
        plan = report_of(call(*card, "--compute", compute))
        assert (plan["weight_format"], plan["compute"], plan["compute_path"]) == (
            "fp8", compute, path,
        )  # fmt: skip
    without = (*here, "--card", "RTX 3060 12GB", "--compute", "fast", "--format")
    for name, path in (("fp8", "dequant"), ("int8", "int8")):  # Ampere multiplies int8, not fp8
        plan = report_of(call(*without, name))
        assert (plan["weight_format"], plan["compute_path"]) == (name, path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flags", [("--format", "int3"), ("--compute", "quick")])
def test_unknown_names_are_bad_usage(tmp_path: Path, model: Path, flags: tuple[str, str]) -> None:
    run = call("generate", "--model", model, *flags, *REQUEST, "-o", tmp_path / "x.mp4")
    assert run.exit_code == 2
    assert flags[1] in run.stderr
