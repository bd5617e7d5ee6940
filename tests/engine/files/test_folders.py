"""ComfyUI's folders as ComfyUI reads them, and names under them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine.files.folders import comfy_folders, weight_files
from penstock.engine.files.locate import Files, locate
from penstock.engine.inspect import inspect
from penstock.engine.lora.file import Lora
from penstock.engine.model.files import ModelFiles
from penstock.errors import CheckpointError
from tests.engine import golden
from tests.engine import lora_files as made
from tests.engine.files.test_locate import COMFY, comfy_root, tensors_of


def test_linked_subfolders_are_entered_and_circles_are_not(tmp_path, model, single) -> None:
    root = tmp_path / "ComfyUI"
    for part, folder in COMFY.items():
        place = tmp_path / "elsewhere" / part
        place.mkdir(parents=True)
        shutil.copy(single[part], place / f"wan_{part}.safetensors")
        (root / "models" / folder).mkdir(parents=True)
        (root / "models" / folder / "linked").symlink_to(place)
    (root / "models" / "vae" / "round").symlink_to(root / "models")
    hidden = root / "models" / "vae" / ".git"
    hidden.mkdir()
    shutil.copy(single["vae"], hidden / "old.safetensors")
    assert tensors_of(locate(root)) == tensors_of(locate(model))


def test_places_in_the_yaml_are_expanded(tmp_path, single, monkeypatch) -> None:
    root = comfy_root(tmp_path / "ComfyUI", single)
    for name, base in (("$MODELS/base", tmp_path / "disk" / "base"), ("~/base", tmp_path / "base"),
                       ("beside", root / "beside")):  # fmt: skip
        monkeypatch.setenv("MODELS", str(tmp_path / "disk"))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (root / "extra_model_paths.yaml").write_text(
            f"a:\n  base_path: {name}\n  is_default: true\n  loras: |\n    Lora\n    $MODELS/x\n"
        )
        found = comfy_folders(root, root / "models")["loras"]
        assert found == (base / "Lora", tmp_path / "disk" / "x", root / "models" / "loras") or (
            found == (tmp_path / "disk" / "x", base / "Lora", root / "models" / "loras")
        )


def test_all_models_may_lie_where_the_yaml_says(tmp_path, model, single) -> None:
    root, disk = tmp_path / "ComfyUI", comfy_root(tmp_path / "disk", single)
    (root / "models").mkdir(parents=True)
    folders = "".join(f"  {folder}: models/{folder}\n" for folder in COMFY.values())
    (root / "extra_model_paths.yaml").write_text(f"a:\n  base_path: {disk}\n{folders}")
    assert tensors_of(locate(root)) == tensors_of(locate(model))


def test_a_name_may_have_its_subfolder(tmp_path, single) -> None:
    root = comfy_root(tmp_path, single)
    place = root / "models" / "diffusion_models"
    for folder in ("a", "b"):
        (place / folder).mkdir()
        shutil.copy(single["transformer"], place / folder / "same.safetensors")
    found = locate(root, Files(transformer=Path("b/same.safetensors")))
    assert found.streamed.raw.path == place / "b" / "same.safetensors"
    with pytest.raises(CheckpointError, match=r"more than one transformer.*a/same.*b/same"):
        locate(root)
    wanted = inspect(root).completed  # type: ignore[union-attr]
    assert wanted == ("--model", str(root), "--transformer", "FILE")  # no part of other families
    with pytest.raises(CheckpointError, match=r"more than one file is called same.*a/same"):
        locate(root, Files(transformer=Path("same.safetensors")))
    shutil.copy(single["transformer"], place / "same.safetensors")
    found = locate(root, Files(transformer=Path("same.safetensors")))
    assert found.streamed.raw.path == place / "same.safetensors"


def test_what_cannot_be_read_is_passed_over_with_a_note(tmp_path, model, single) -> None:
    root = comfy_root(tmp_path, single)
    vae = root / "models" / "vae"
    (vae / "half.safetensors").write_bytes(b"\xff" * 40)
    (vae / "gone.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    save_file({"a": torch.zeros(1)}, vae / "another_models.safetensors")
    found = locate(root)
    assert tensors_of(found) == tensors_of(locate(model))
    assert len(found.notes) == 2  # another model's file is nothing to be told of
    assert "half.safetensors" in "".join(found.notes) and "gone.safetensors" in "".join(found.notes)
    notes = [o.value for o in ModelFiles.open(root).origins() if o.name == "note"]
    assert notes == list(found.notes)


def test_shards_under_a_root_are_one_file(tmp_path, model, single) -> None:
    root = comfy_root(tmp_path, single)
    (file,) = weight_files(root / "models" / "diffusion_models")
    tensors = load_file(file)
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        shard = file.with_name(f"wan-{number:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in names}, shard)
    file.unlink()
    assert tensors_of(locate(root)) == tensors_of(locate(model))


def test_a_lora_is_found_by_its_name(tmp_path, single) -> None:
    root = comfy_root(tmp_path / "ComfyUI", single)
    source = locate(root).streamed
    pairs = made.pairs(source, made.linears(source, outside=False)[:2])
    extra = tmp_path / "webui" / "Lora"
    for folder in (root / "models" / "loras" / "wan", extra):
        folder.mkdir(parents=True)
    made.write_comfy(root / "models" / "loras" / "wan" / "style.safetensors", pairs)
    made.write_comfy(extra / "motion.safetensors", pairs)
    (root / "extra_model_paths.yaml").write_text(
        f"a:\n  base_path: {tmp_path}\n  loras: webui/Lora\n"
    )
    for name, place in (
        ("style.safetensors", root / "models" / "loras" / "wan"),
        ("wan/style.safetensors", root / "models" / "loras"),
        ("motion.safetensors", extra),
    ):
        opened = ModelFiles.open(root, loras=[Lora(Path(name), 0.5)])
        assert opened.loras.given == (Lora(place / name, 0.5),)
        # A job remembers the place, not the name
        assert opened.opening.values()["loras"] == [[str(place / name), 0.5]]
    shutil.copy(
        extra / "motion.safetensors", root / "models" / "loras" / "wan" / "motion.safetensors"
    )
    opened = ModelFiles.open(root, loras=[Lora(Path("motion.safetensors"))])
    assert opened.loras.given[0].path == extra / "motion.safetensors"  # its folder's own counts
    (extra / "deep").mkdir()
    shutil.copy(extra / "motion.safetensors", extra / "deep" / "style.safetensors")
    with pytest.raises(CheckpointError, match="more than one LoRA is called style"):
        ModelFiles.open(root, loras=[Lora(Path("style.safetensors"))])
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelFiles.open(root, loras=[Lora(Path("none.safetensors"))])
    looked = r"styel.safetensors does not exist: .* in .*loras.*, found style.safetensors"
    for name in ("styel.safetensors", "wan/styel.safetensors"):
        with pytest.raises(CheckpointError, match=looked):
            ModelFiles.open(root, loras=[Lora(Path(name))])


def test_a_configs_owner_is_asked_for(tmp_path, model) -> None:
    """All parts in one folder, beside the transformer's config.json."""
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(model / "transformer" / "config.json", flat)
    for part in golden.PARTS:
        (file,) = (model / part).glob("*.safetensors")
        os.link(file, flat / f"{part}.safetensors")
    shutil.copytree(model / "tokenizer", flat / "tokenizer")
    # The tiny networks' own configs tell more than shapes do; what is asked is whose they are
    from penstock.engine.files.locate import open_component

    config = open_component(flat / "transformer.safetensors").config
    assert config == open_component(model / "transformer").config
    assert open_component(flat / "vae.safetensors").component == "vae"
    text = open_component(flat / "text_encoder.safetensors")
    assert text.config["d_model"] == open_component(model / "text_encoder").config["d_model"]
