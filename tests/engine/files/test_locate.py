"""Models found wherever users keep them: every door leads to the same parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.files import hub
from penstock.engine.files.locate import Files, locate
from penstock.errors import CheckpointError, PickleRefused, TensorMismatch, UsageError
from tests.engine import golden

COMFY = {
    "transformer": "diffusion_models",
    "vae": "vae",
    "text_encoder": "text_encoders",
    "image_encoder": "clip_vision",
}


def comfy_root(root: Path, single, folders=COMFY) -> Path:
    for part, folder in folders.items():
        place = root / "models" / folder / "wan"
        place.mkdir(parents=True)
        shutil.copy(single[part], place / f"wan_{part}.safetensors")
    return root


def tensors_of(found):
    """Every place of every part, and what the parts are."""
    return {
        source.component: {name: entry.nbytes for name, entry in source.entries().items()}
        for source in found.components()
    }


def test_diffusers_folder(model):
    found = locate(model)
    assert [source.component for source in found.components()] == [
        "transformer", "text_encoder", "vae", "image_encoder",
    ]  # fmt: skip
    assert found.tokenizer == model / "tokenizer"
    assert found.scheduler["flow_shift"] == 3.0
    assert found.image_processor["crop_size"] == {"height": 32, "width": 32}


def test_text_to_video_needs_no_image_encoder(tmp_path):
    found = locate(golden.write_model(tmp_path / "t2v", image_to_video=False))
    assert "image_encoder" not in found.parts
    assert found.streamed.title.startswith("Wan2.1 T2V")


def test_single_files(model, single):
    found = locate(None, Files(**single))
    assert tensors_of(found) == tensors_of(locate(model))
    assert found.tokenizer == found.parts["text_encoder"].extras["spiece_model"]
    assert found.scheduler["flow_shift"] == 5.0
    assert found.image_processor["crop_size"] == {"height": 224, "width": 224}
    others = {name: path for name, path in single.items() if name != "transformer"}
    assert tensors_of(locate(single["transformer"], Files(**others))) == tensors_of(found)


@pytest.mark.parametrize(
    "folders", [COMFY, COMFY | {"transformer": "unet", "text_encoder": "clip"}]
)
@pytest.mark.parametrize("inside", [False, True])
def test_comfyui_root(tmp_path, model, single, folders, inside):
    root = comfy_root(tmp_path / "ComfyUI", single, folders)
    save_file({"a": torch.zeros(1)}, root / "models" / "vae" / "another_models_vae.safetensors")
    (root / "models" / "vae" / "half.safetensors").write_bytes(b"\xff")
    found = locate(root / "models" if inside else root)
    assert tensors_of(found) == tensors_of(locate(model))


def test_comfyui_with_extra_paths(tmp_path, model, single):
    root = comfy_root(tmp_path / "ComfyUI", single)
    shutil.rmtree(root / "models" / "vae")
    other = tmp_path / "elsewhere" / "autoencoders"
    other.mkdir(parents=True)
    shutil.copy(single["vae"], other / "wan_vae.safetensors")
    (root / "extra_model_paths.yaml").write_text(
        f"comfyui:\n  base_path: {tmp_path / 'elsewhere'}\n"
        "  vae: |\n    missing\n    autoencoders\n"
        "  checkpoints: models/checkpoints\nother: null\n"
    )
    assert locate(root).parts["vae"].raw.path == other / "wan_vae.safetensors"
    (root / "extra_model_paths.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match="extra_model_paths"):
        locate(root)


def test_two_candidates_are_a_question(tmp_path, single):
    root = comfy_root(tmp_path, single)
    place = root / "models" / "diffusion_models"
    shutil.copy(single["transformer"], place / "second.safetensors")
    with pytest.raises(CheckpointError, match=r"name it with --transformer") as caught:
        locate(root)
    assert "second.safetensors" in str(caught.value)
    found = locate(root, Files(transformer=Path("second.safetensors")))
    assert found.parts["transformer"].raw.path == place / "second.safetensors"


def original_folder(folder: Path, model, single, *, pickles: bool) -> Path:
    """Wan's repository: sharded transformer, its own config.json, the rest as pickles."""
    folder.mkdir()
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    keys = {names[name]: tensor for name, tensor in tensors.items()}
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(keys, folder / shard)
    index = {"weight_map": dict.fromkeys(keys, shard)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 5120}))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    for part, name in (("text_encoder", "models_t5_umt5-xxl-enc-bf16"), ("vae", "Wan2.1_VAE"),
                       ("image_encoder", "models_clip_open-clip")):  # fmt: skip
        if pickles:
            (folder / f"{name}.pth").write_bytes(b"PK\x03\x04")
        else:
            shutil.copy(single[part], folder / f"{name}.safetensors")
    return folder


def test_original_folder(tmp_path, model, single):
    folder = original_folder(tmp_path / "Wan", model, single, pickles=False)
    found = locate(folder)
    assert tensors_of(found) == tensors_of(locate(model))
    assert found.tokenizer == folder / "google" / "umt5-xxl"


def test_pickles_are_refused_with_the_remedy(tmp_path, model, single):
    folder = original_folder(tmp_path / "Wan", model, single, pickles=True)
    with pytest.raises(PickleRefused, match=r"models_t5.*\.pth.*Comfy-Org"):
        locate(folder)
    given = Files(text_encoder=single["text_encoder"], vae=single["vae"])
    with pytest.raises(PickleRefused, match="models_clip"):
        locate(folder, given)
    files = {name: path for name, path in single.items() if name != "transformer"}
    assert tensors_of(locate(folder, Files(**files))) == tensors_of(locate(model))


def test_given_files_win(model, single):
    found = locate(model, Files(vae=single["vae"]))
    assert found.parts["vae"].raw.path == single["vae"]
    assert found.parts["text_encoder"].raw.path == model / "text_encoder"


def test_a_part_in_the_wrong_place_is_named(single):
    with pytest.raises(CheckpointError, match=r"found a text encoder .*--text-encoder"):
        locate(None, Files(**(single | {"vae": single["text_encoder"]})))
    with pytest.raises(CheckpointError, match="no vae"):
        locate(single["transformer"], Files(text_encoder=single["text_encoder"]))


def test_tokenizer_is_found_or_asked_for(tmp_path, model, single):
    bare = tmp_path / "umt5" / "x.safetensors"
    bare.parent.mkdir()
    tensors = golden.load(model, "text_encoder")
    save_file(tensors, bare)
    files = dict(single) | {"text_encoder": bare}
    with pytest.raises(CheckpointError, match="--tokenizer"):
        locate(None, Files(**files))
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(None, Files(**files, tokenizer=tmp_path / "none"))
    assert (
        locate(None, Files(**files, tokenizer=model / "tokenizer")).tokenizer == model / "tokenizer"
    )
    (bare.parent / "spiece.model").write_bytes(b"x")
    assert locate(None, Files(**files)).tokenizer == bare.parent


def test_no_model_and_other_models(tmp_path, model):
    with pytest.raises(UsageError, match="--transformer"):
        locate(None)
    with pytest.raises(CheckpointError, match="does not exist"):
        locate(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a model folder"):
        locate(tmp_path)
    for index, word in (
        ({"_class_name": "FluxPipeline"}, "another kind"),
        ({"_class_name": "WanPipeline", "transformer_2": ["diffusers", "X"]}, "transformer_2/"),
        ({"_class_name": "WanPipeline", "expand_timesteps": True}, "no transformer"),
        ({"_class_name": "WanVACEPipeline"}, "another kind.*WanVACEPipeline"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=word):
            locate(tmp_path)
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(CheckpointError, match="model_index.json"):
        locate(tmp_path)


def test_a_broken_component_is_named(tmp_path, model):
    copy = shutil.copytree(model, tmp_path / "m")
    (copy / "vae" / "config.json").write_text(
        (model / "vae" / "config.json").read_text().replace('"base_dim": 8', '"base_dim": 16')
    )
    with pytest.raises(TensorMismatch, match="misshaped"):
        locate(copy)


class Hub:
    """Stands in for the hub: a cache that may be cut short, and a network that may be down."""

    def __init__(self, cached=None, remote=None):
        self.cached, self.remote, self.calls = cached, remote, []

    def __call__(self, name, offline):
        self.calls.append((name, offline))
        folder = self.cached if offline else self.remote
        if folder is None:
            raise FileNotFoundError("no snapshot") if offline else ConnectionError("no route")
        return folder


def test_hub_ids(tmp_path, model):
    cache = Hub(cached=model)
    assert (
        locate("org/wan@main", fetch=cache).parts["transformer"].raw.path == model / "transformer"
    )
    assert cache.calls == [("org/wan@main", True)]
    absent = Hub(remote=model)
    assert locate("org/wan", fetch=absent).origin == "org/wan"
    partial = shutil.copytree(model, tmp_path / "partial")
    shutil.rmtree(partial / "vae")
    resumed = Hub(cached=partial, remote=model)
    assert locate("org/wan", fetch=resumed).parts["vae"].raw.path == model / "vae"
    assert [offline for _, offline in resumed.calls] == [True, False]
    for offline in (Hub(), Hub(cached=partial)):
        with pytest.raises(CheckpointError, match=r"cannot be downloaded.*Go online"):
            locate("org/wan", fetch=offline)


def test_the_real_cache_offline(tmp_path, monkeypatch, model):
    """huggingface_hub's own cache layout, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--wan"
    shutil.copytree(model, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.hub_snapshot("org/wan", True).name == "0" * 40
    with pytest.raises(FileNotFoundError):
        hub.hub_snapshot("org/other", True)
