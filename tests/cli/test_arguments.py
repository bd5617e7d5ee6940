"""Arguments as people give them: home folders, seeds of -1, rates with a fraction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from tests.engine import lora_files as made

DEMO = Path(__file__).parents[2] / "penstock" / "assets" / "demo.png"
BUDGETS = ("--vram", "200MiB", "--ram", "200MiB", "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a model, its tokenizer apart, a LoRA and a place for videos."""
    folder = tmp_path_factory.mktemp("home")
    model = write_tiny_model(folder / "model", image_to_video=False, vae={"base_dim": 8})
    shutil.copytree(model / "tokenizer", folder / "tokens")
    source = locate(model).streamed
    made.write_comfy(
        folder / "l.safetensors", made.pairs(source, made.linears(source, outside=False))
    )
    (folder / "mine.toml").write_text('vram = "200MiB"\nram = "200MiB"\n')
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_tilde_is_the_home_folder_in_every_path(home: Path) -> None:
    shutil.copy(DEMO, home / "a.png")
    done = _call(
        "generate", "--model=~/model", "--tokenizer=~/tokens", "--lora=~/l.safetensors",
        "--transformer=~/model/transformer", "--vae=~/model/vae", "--job=~/job",
        "--prompt", "a", "--size", "48x32", "--frames", "5", "--steps", "1", "--seed", "-1",
        "--fps", "23.976", "--output=~/a.mp4", "--json", *BUDGETS,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with av.open(str(home / "a.mp4")) as container:
        assert str(container.streams.video[0].average_rate) == "24000/1001"
    assert json.loads(done.stdout)["report"]["fps"] == 23.976
    assert json.loads(done.stdout)["report"]["seed"] >= 0
    planned = _call("plan", "--model=~/model", "--image=~/a.png", "--max-area", "64x64", *BUDGETS)
    assert planned.exit_code == 0, planned.output
    assert _call("inspect", "~/model").exit_code == 0
    assert _call("--log-file=~/a.log", "profiles").exit_code == 0
    assert (home / "a.log").stat().st_size > 0


def test_hints_hold_from_everywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "my loras").mkdir(exist_ok=True)
    shutil.copy(home / "l.safetensors", home / "my loras")
    said = _call("inspect", "model").stdout
    assert f"use it: penstock generate --model {home / 'model'}" in said
    said = _call("inspect", "my loras/l.safetensors").stdout
    assert f"--lora '{home / 'my loras' / 'l.safetensors'}'" in said
    packed = _call("pack", "--model", "model", "--format", "int8", "-o", "packed")
    assert f"penstock generate --model {home / 'packed'}" in packed.stdout


def test_strict_loras_and_what_is_left_out(home: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    stranger = {"diffusion_model.patch_embedding.diff": torch.zeros(96, 36, 1, 2, 2)}
    path = tmp_path / "i2v.safetensors"
    save_file(load_file(home / "l.safetensors") | stranger, path)
    request = ("--size", "48x32", "--frames", "5", *BUDGETS)
    told = _call("plan", "--model", home / "model", "--lora", path, *request)
    assert told.exit_code == 0 and "left out" in told.output
    plan = _call("plan", "--model", home / "model", "--lora", path, "--json", *request)
    notes = [o["value"] for o in json.loads(plan.stdout)["origins"] if o["name"] == "note"]
    assert len(notes) == 1 and "patch_embedding.diff" in notes[0]
    packed = _call("pack", "--model", home / "model", "--lora", path, "--format", "int8",
                   "-o", tmp_path / "packed")  # fmt: skip
    assert packed.exit_code == 0 and "note: i2v.safetensors" in packed.output
    for command in (("plan", *request), ("generate", "--prompt", "a", "-o", "x.mp4", *request),
                    ("pack", "--format", "int8", "-o", tmp_path / "no")):  # fmt: skip
        refused = _call(command[0], "--model", home / "model", "--lora", path, "--lora-strict",
                        *command[1:])  # fmt: skip
        assert refused.exit_code == 1 and "1 tensors do not fit" in refused.output
    endless = _call("generate", "--model", home / "model", "--prompt", "a", "-o", "x.mp4",
                    "--lora", f"{path}:nan")  # fmt: skip
    assert endless.exit_code == 2 and "finite" in endless.output


def test_a_size_said_twice_is_said_in_plain_words(home: Path) -> None:
    refused = _call("plan", "--model", home / "model", "--size", "48x32", "--max-area", "480p")
    assert refused.exit_code == 2
    assert "--size and --max-area cannot be used together" in refused.output
