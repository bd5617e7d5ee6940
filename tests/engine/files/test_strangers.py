"""What lies in the place of a model now and then: named for what it is, or read all the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from penstock.engine.files.locate import locate, open_component
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.inspect import inspect
from penstock.engine.lora.file import open_lora
from penstock.errors import CheckpointError
from tests.engine import golden
from tests.engine.files.test_locate import original_folder, tensors_of
from tests.engine.files.test_spm import train

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 17178231234\n"
)
STRANGERS = {
    "pointer": (POINTER, "is a Git LFS pointer.*17,178,231,234 bytes.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>Access denied", "is a web page.*Access denied.*sign in"),
    "answer": (b'<?xml version="1.0"?><Error>NoSuchKey</Error>', "is a web page"),
    "message": (b'{"error": "Repository not found"}', "is a message.*Repository not found"),
    "zeros": (bytes(4096), "nothing but zeros.*Let the download finish"),
    "noise": (b"\xff" * 600, "compare its size"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@pytest.mark.parametrize("what", STRANGERS)
def test_it_is_called_by_its_name(what: str, suffix: str, tmp_path: Path) -> None:
    data, words = STRANGERS[what]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    for look in (inspect, open_component, open_lora):
        with pytest.raises(CheckpointError, match=words) as caught:
            look(path)
        assert str(path) in str(caught.value)


def test_a_link_to_nothing_is_one(tmp_path: Path) -> None:
    link = tmp_path / "a.safetensors"
    link.symlink_to(tmp_path / "usb" / "a.safetensors")
    for look in (inspect, open_component, open_lora, locate):
        with pytest.raises(CheckpointError, match=r"link to a file that is not there.*usb"):
            look(link)


@pytest.fixture
def sharded(tmp_path: Path, model: Path) -> Path:
    """The model with its transformer in three shards, whose index is lost."""
    folder = shutil.copytree(model, tmp_path / "m")
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    for number in range(3):
        part = {name: tensors[name] for name in list(tensors)[number::3]}
        save_file(part, file.with_name(f"{file.stem}-0000{number + 1}-of-00003.safetensors"))
    return folder


def test_shards_without_their_index_are_read(sharded: Path, model: Path) -> None:
    assert tensors_of(locate(sharded)) == tensors_of(locate(model))
    shard = sharded / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    assert open_component(shard).entries().keys() == locate(model).streamed.entries().keys()


def test_missing_shards_are_named(sharded: Path) -> None:
    folder = sharded / "transformer"
    lost = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"download incomplete.*00002-of-00003"):
        locate(sharded)
    lost.symlink_to(sharded / "blob")
    with pytest.raises(CheckpointError, match=r"incomplete.*00002-of-00003.*links to nothing"):
        open_component(folder)


def test_a_partial_snapshot_says_what_is_missing(sharded: Path) -> None:
    """Links to blobs that have not come, a shard of an index, a folder that is not there."""
    (vae,) = (sharded / "vae").glob("*.safetensors")
    vae.unlink()
    vae.symlink_to(sharded / "blobs" / "abc")
    shards = sorted((sharded / "transformer").glob("*.safetensors"))
    names = {name: path.name for path in shards for name in load_file(path)}
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    shards[2].unlink()
    shutil.rmtree(sharded / "image_encoder")
    with pytest.raises(CheckpointError, match="download incomplete") as caught:
        locate(sharded)
    text = str(caught.value)
    for part in (f"vae/{vae.name}", f"transformer/{shards[2].name}", "no image encoder"):
        assert part in text
    assert "text_encoder" not in text.replace(str(sharded), "")


def test_a_hub_model_that_came_in_part_says_so(sharded: Path) -> None:
    shutil.rmtree(sharded / "vae")

    def fetch(model: str, offline: bool) -> Path:
        if offline:
            return sharded
        raise ConnectionError("no route")

    with pytest.raises(CheckpointError, match=r"not whole in the local cache.*no vae.*no route"):
        locate("org/wan", fetch=fetch)


@pytest.mark.parametrize("shape", ["time left out", "outputs and inputs in one"])
def test_a_patch_embedding_of_four_dimensions_is_unfolded(
    shape: str,
    tmp_path: Path,
    model: Path,
) -> None:
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    weight = tensors["patch_embedding.weight"]
    rows, inputs, _, height, width = weight.shape
    dims = (rows, inputs, height, width) if shape == "time left out" else (-1, 1, height, width)
    flat = tmp_path / "flat.safetensors"
    save_file(tensors | {"patch_embedding.weight": weight.reshape(dims)}, flat)
    shutil.copy(model / "transformer" / "config.json", tmp_path)
    source = open_component(flat)
    source.check()
    assert source.entries()["patch_embedding.weight"].shape == tuple(weight.shape)


def test_an_original_folder_is_described_as_a_whole(tmp_path, model, single) -> None:
    folder = original_folder(tmp_path / "Wan", model, single, pickles=False)
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "i2v"}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    assert {part.component for part in found.components} == {*golden.PARTS}
    assert not found.problem and found.arguments == ("--model", str(folder))
    assert found.lines()[-1] == f"use it: penstock generate --model {folder}"


def test_pickles_in_an_original_folder_are_named(tmp_path, model, single) -> None:
    folder = original_folder(tmp_path / "Wan", model, single, pickles=True)
    found = inspect(folder)
    assert [part.component for part in found.components] == ["transformer"]
    text = "\n".join(found.lines())
    for name in ("models_t5_umt5-xxl-enc-bf16.pth is a pickle", "Wan2.1_VAE.pth is a pickle",
                 "models_clip_open-clip.pth is a pickle"):  # fmt: skip
        assert name in text
    wanted = "--text-encoder FILE --vae FILE --image-encoder FILE"
    assert f"penstock generate --model {folder} {wanted}" in text
    assert "use it: penstock generate --model" not in text  # it would be refused
    assert f"use it: penstock generate --transformer {folder}" in text


def test_pickles_do_not_hide_what_is_wrong_with_the_transformer(tmp_path, model, single) -> None:
    folder = original_folder(tmp_path / "Wan", model, single, pickles=True)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    for look in (inspect, locate):
        with pytest.raises(CheckpointError, match=f"{weights.name} cannot be used.*Download"):
            look(folder)


@pytest.mark.parametrize("dtype", ["F4", "F6_E3M2", "F2"])
def test_numbers_of_another_type_are_no_damage(dtype: str, tmp_path: Path) -> None:
    fields = {"dtype": dtype, "shape": [8], "data_offsets": [0, 4]}
    header = json.dumps({"blocks.0.self_attn.q.weight": fields}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=rf"found {dtype}\. The file may be sound") as caught:
        inspect(path)
    assert "ownload" not in str(caught.value)


def test_a_tokenizer_folder_may_hold_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train())
    one, whole = Tokenizer(tmp_path), Tokenizer(tmp_path / "spiece.model")
    assert one.tokenise(["a cat"]) == whole.tokenise(["a cat"])


def test_a_vae_of_few_blocks_is_known_by_its_shapes() -> None:
    mini = Path(__file__).parents[3] / "penstock" / "assets" / "mini" / "vae"
    source = open_component(mini)
    (file,) = mini.glob("*.safetensors")
    assert source.config["num_res_blocks"] == 1
    alone = os.path.relpath(file)
    assert open_component(Path(alone)).component == "vae"
