"""``--lora`` and ``--distilled`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.packs.file import PackFile
from tests.engine import lora_files as made

BUDGETS = ("--vram", "200MiB", "--ram", "200MiB", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = locate(model).streamed
    pairs = made.pairs(source, made.linears(source, outside=False))
    return made.write_comfy(tmp_path_factory.mktemp("loras") / "style.safetensors", pairs)


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_takes_loras_and_the_settings_of_a_distilled_model(
    model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    done = _call(
        "generate", "--model", model, "--prompt", "a cat", "--size", "48x32", "--frames", "5",
        "--lora", f"{lora}:0.5", "--lora", lora, "--distilled", "--seed", "1", "--json",
        "-o", tmp_path / "a.mp4", *BUDGETS,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)["plan"]
    denoise = next(phase for phase in plan["phases"] if phase["name"] == "denoise")
    assert denoise["branches"] == 1
    assert dict(denoise["work"])["lora"] > 0
    named = [origin["value"] for origin in plan["origins"] if origin["name"] == "LoRA"]
    assert [value.partition(",")[0] for value in named] == [
        "style.safetensors at strength 0.5",
        "style.safetensors at strength 1",
    ]


def test_a_plan_counts_loras(model: Path, lora: Path) -> None:
    request = ("--size", "48x32", "--frames", "5", "--json", *BUDGETS)
    plain = json.loads(_call("plan", "--model", model, *request).stdout)
    found = json.loads(
        _call("plan", "--model", model, "--lora", lora, "--distilled", *request).stdout
    )
    assert found["peak_vram_bytes"] > 0
    passes = [phase["branches"] for phase in found["phases"] if phase["name"] == "denoise"]
    assert passes == [1]
    read = [
        next(phase["read_bytes"] for phase in plan["phases"] if phase["name"] == "context")
        for plan in (plain, found)
    ]
    assert read[1] > read[0]
    refused = _call("plan", "--synthetic", "wan2.1-i2v-14b", "--lora", lora)
    assert refused.exit_code == 2


def test_inspect_and_pack_take_loras(model: Path, lora: Path, tmp_path: Path) -> None:
    said = _call("inspect", lora)
    assert "LoRA for Wan2.1" in said.stdout and "rank 3" in said.stdout
    assert json.loads(_call("inspect", lora, "--json").stdout)["ranks"]
    packed = tmp_path / "packed"
    done = _call("pack", "--model", model, "--format", "int8", "--lora", f"{lora}:0.5",
                 "-o", packed)  # fmt: skip
    assert done.exit_code == 0, done.output
    (named,) = json.loads((packed / "model_index.json").read_text())["_penstock"]["loras"]
    assert (named["file"], named["strength"]) == ("style.safetensors", 0.5)
    assert len(named["sha256"]) == 64
    path = packed / "transformer" / "diffusion_pytorch_model.safetensors"
    assert PackFile.open(path).about["loras"] == [named]
    assert "loras" not in PackFile.open(packed / "vae" / path.name).about


def test_a_bad_lora_is_one_line(model: Path, tmp_path: Path) -> None:
    gone = _call("generate", "--model", model, "--prompt", "a cat", "-o", tmp_path / "a.mp4",
                 "--lora", tmp_path / "none.safetensors")  # fmt: skip
    assert gone.exit_code == 1
    assert "does not exist" in gone.output
