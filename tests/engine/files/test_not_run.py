"""Models that are known by name and not run; parts of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files, locate
from penstock.engine.inspect import inspect
from penstock.engine.prepared import Prepared
from penstock.errors import CheckpointError, NotRun
from tests.engine import golden

FOREIGN = {
    "vace_blocks.0.self_attn.q.weight": "Wan VACE",
    "vace_patch_embedding.weight": "Wan VACE",
    "casual_audio_encoder.encoder.conv1.conv.weight": "Wan2.2 S2V",
    "pose_patch_embedding.weight": "Wan2.2 Animate",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan2.2 Animate",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "audio_proj.proj1.weight": "MultiTalk",
    "control_adapter.conv.weight": "Wan Fun Camera",
    "ref_conv.weight": "Wan Fun Control",
    "fps_embedding.weight": "SkyReels-V2",
    "blocks.0.cam_encoder.weight": "ReCamMaster",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A text-to-video transformer under its makers' names."""
    folder = golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    names = golden.original_names("transformer", list(tensors))
    return {names[name]: tensor for name, tensor in tensors.items()}


def _refused(path: Path, name: str) -> None:
    """By everything that opens a file, and by the commands, whose exit code says so."""
    for look in (inspect, locate, lambda found: Engine.open(found, device="cpu")):
        with pytest.raises(NotRun, match=name):
            look(path)
    for words in (
        ["inspect", str(path)],
        ["plan", "--model", str(path), "--device", "cpu"],
        ["generate", "--model", str(path), "--device", "cpu", "--prompt", "a", "-o", "x.mp4"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 1
        assert name in done.stderr


@pytest.mark.parametrize("prefix", ["model.diffusion_model."])
@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_tensor_names_the_model(
    key: str, prefix: str, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {prefix + name: tensor for name, tensor in original.items()}
    save_file(tensors | {prefix + key: torch.zeros(2, 2)}, path)
    with pytest.raises(NotRun, match=FOREIGN[key]):
        inspect(path)


def test_every_way_in_refuses_it_by_name(original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "wan2.1_vace_14B.safetensors"
    save_file(original | {"vace_patch_embedding.weight": torch.zeros(2, 2)}, path)
    _refused(path, "Wan VACE")


def test_so_does_a_folder_with_other_files(
    original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    root = tmp_path / "models"
    for folder in ("diffusion_models", "vae", "text_encoders"):
        (root / folder).mkdir(parents=True)
    save_file({"other": torch.zeros(1)}, root / "diffusion_models" / "a.safetensors")
    stranger = {"face_adapter.x.weight": torch.zeros(1)}
    save_file(original | stranger, root / "diffusion_models" / "b.safetensors")
    _refused(tmp_path, "Wan2.2 Animate")


@pytest.mark.parametrize(
    "channels, out, name",
    [
        (48, 16, "Wan Fun Control"),
        (52, 16, "Wan2.2 Fun Control"),
        (32, 16, "Wan Fun Camera"),
        (100, 48, "Wan2.2 Fun InP 5B"),
        (148, 48, "Wan2.2 Fun Control 5B"),
    ],
)
def test_so_does_the_number_of_channels(
    channels: int, out: int, name: str, original: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    weight, width = original["patch_embedding.weight"], original["head.head.weight"].shape[1]
    wide = {
        "patch_embedding.weight": torch.zeros(weight.shape[0], channels, *weight.shape[2:]),
        "head.head.weight": torch.zeros(4 * out, width),
        "head.head.bias": torch.zeros(4 * out),
    }
    config = {"_class_name": "WanTransformer3DModel", "in_channels": channels}
    config["out_channels"] = out
    save_file(original | wide, path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    _refused(path, name)


@pytest.mark.parametrize(
    "part, entries, word",
    [
        ("transformer", {"text_dim": 56}, "text encoder.*expected d_model 56.*found 48"),
        ("transformer", {"image_dim": 48}, "image encoder.*expected hidden_size 48.*found 40"),
    ],
)
def test_parts_of_two_models_are_refused(
    part: str, entries: dict[str, int], word: str, tmp_path: Path, i2v_folder: Path
) -> None:
    """Each is whole by itself; only together they cannot be."""
    from penstock.engine.families.wan.tiny import write_tiny_model

    other = write_tiny_model(tmp_path / "other", vae={"base_dim": 8}, transformer=entries)
    files = Files(transformer=other / part)
    for start in (
        lambda: Engine.open(i2v_folder, files=files, device="cpu"),
        lambda: Prepared.open(i2v_folder, files=files),
    ):
        with pytest.raises(CheckpointError, match=word):
            start()


def test_a_vae_of_other_latents_is_refused(tmp_path: Path, t2v_folder: Path) -> None:
    from penstock.engine.families.wan.tiny import write_tiny_model

    vae = {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "base_dim": 8}
    other = write_tiny_model(tmp_path / "other", image_to_video=False, vae=vae)
    model = shutil.copytree(t2v_folder, tmp_path / "m")
    shutil.rmtree(model / "vae")
    shutil.copytree(other / "vae", model / "vae")
    with pytest.raises(CheckpointError, match="vae and the transformer.*expected z_dim 16.*4"):
        Engine.open(model, device="cpu")
