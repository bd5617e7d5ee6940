"""Checkpoints: found, opened lazily, read exactly, refused with a reason."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.errors import (
    CheckpointChanged,
    CheckpointError,
    HeaderError,
    PickleRefused,
    TensorMismatch,
)
from penstock.formats.tags import ITEM_BYTES
from penstock.offload.checkpoint import Checkpoint, torch_dtype
from penstock.offload.header import MAX_HEADER_BYTES
from tests.offload.blocks import raw_file, same


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(5, 3),
        "b.weight": torch.randn(4, 2, 2).bfloat16(),
        "c": torch.tensor(3.5),
        "none": torch.empty(0, 7),
        "fp8": torch.randn(6, 2).to(torch.float8_e4m3fn),
        "mask": torch.tensor([True, False, True]),
    }


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], **changes: Any) -> Path:
    """A sharded checkpoint; ``changes`` replace entries of the weight map (None removes)."""
    folder.mkdir(exist_ok=True)
    weight_map: dict[str, Any] = {}
    for name, content in shards.items():
        save_file(content, folder / name)
        weight_map |= dict.fromkeys(content, name)
    weight_map |= changes
    weight_map = {name: shard for name, shard in weight_map.items() if shard is not None}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1.5e3}, "weight_map": weight_map}))
    return index


def test_reads_like_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, {"format": "pt"})
    with Checkpoint.open(path) as checkpoint:
        assert len(checkpoint) == 6 and set(checkpoint) == set(tensors())
        assert same({name: checkpoint.read(name) for name in checkpoint}, load_file(path))
        assert checkpoint.metadata == {"format": "pt"}
        assert list(checkpoint.files) == [path] == [checkpoint.path]
        entry = checkpoint["b.weight"]
        assert (entry.name, entry.file, entry.dtype, entry.shape, entry.nbytes) == (
            "b.weight", path, "BF16", (4, 2, 2), 32
        )  # fmt: skip
        start = path.read_bytes()[entry.offset : entry.offset + 32]
        assert start == checkpoint.read("b.weight").view(torch.uint8).numpy().tobytes()
    assert same({"c": checkpoint.read("c")}, {"c": load_file(path)["c"]})
    checkpoint.close()


def test_opening_reads_the_header_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.zeros(1000) for i in range(20)}, path)
    read: list[int] = []
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at: read.append(len(views[0])) or real(fd, views, at)
    )
    Checkpoint.open(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(read) == 9 + 8 + header < 3000


def test_rows(tmp_path: Path) -> None:
    table = torch.randn(50, 6).bfloat16()
    save_file({"table": table, "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        rows = [3, 49, 0, 3]
        assert torch.equal(checkpoint.read_rows("table", rows), table[rows])
        assert torch.equal(checkpoint.read_rows("table", torch.tensor(rows)), table[rows])
        assert checkpoint.read_rows("table", []).shape == (0, 6)
        for bad in ([50], [-1]):
            with pytest.raises(TensorMismatch, match="table has no such row: expected 0 to 49"):
                checkpoint.read_rows("table", bad)
        with pytest.raises(TensorMismatch, match="no such row"):
            checkpoint.read_rows("scalar", [0])


def test_every_type_has_a_torch_type() -> None:
    for tag, item_bytes in ITEM_BYTES.items():
        assert torch_dtype(tag).itemsize == item_bytes
    with pytest.raises(TensorMismatch, match="found GGUF_Q8_0"):
        torch_dtype("GGUF_Q8_0")


SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "model.fp16.safetensors",
          "diffusion_pytorch_model.bf16.safetensors", "wan2.1_vae.safetensors")  # fmt: skip
INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json",
           "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json")  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    save_file(tensors(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).path == tmp_path / name


@pytest.mark.parametrize("name", INDEXES)
def test_a_folder_with_an_index(tmp_path: Path, name: str) -> None:
    shards = {"m.fp16-00001-of-00002.safetensors": {"a": torch.ones(2)},
              "m.fp16-00002-of-00002.safetensors": {"b": torch.ones(3)}}  # fmt: skip
    sharded(tmp_path, shards).rename(tmp_path / name)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.path == tmp_path / name
        assert set(checkpoint) == {"a", "b"} and len(checkpoint.files) == 2
        assert torch.equal(checkpoint.read("b"), torch.ones(3))
        checkpoint.check_unchanged()


def test_which_file_wins(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    save_file(tensors(), tmp_path / "model.fp16.safetensors")
    sharded(tmp_path, {"model-00001-of-00001.safetensors": tensors()})
    assert Checkpoint.open(tmp_path).path.name == "model.safetensors"
    save_file(tensors(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="more than one checkpoint"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("names", [("model.fp16.safetensors", "model.bf16.safetensors"),
                                   ("a.safetensors", "b.safetensors")])  # fmt: skip
def test_more_than_one_candidate(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        save_file(tensors(), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"found {names[0][0]}.*Name the file"):
        Checkpoint.open(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an empty folder"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights.*found config.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        Checkpoint.open(tmp_path / "nothing.safetensors")


class Bomb:
    """A pickle that says so if it is ever opened."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["m.bin", "m.ckpt", "m.pth", "m.pt", "m.pkl", "m.safetensors"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_are_refused_with_the_remedy(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    for target in (path, tmp_path):
        with pytest.raises(PickleRefused, match=r"Convert it .*save_file.*weights_only=True"):
            Checkpoint.open(target)


def test_torch_files_under_another_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(PickleRefused, match="is a pickle"):
        Checkpoint.open(path)


def test_a_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file("{" + " " * 0x27E + "}"))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert len(Checkpoint.open(path)) == 0


TWO = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(3)}}


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"c": "one.safetensors"}, TensorMismatch, "1 missing from the shards, the first is c"),
        ({"b": None, "x": "two.safetensors"}, TensorMismatch, "missing from the shards"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, HeaderError, "expected a in two"),
        ({"b": "three.safetensors"}, CheckpointError, "No such file"),
        ({"b": "../two.safetensors"}, HeaderError, "expected plain names"),
        ({"b": "/two.safetensors"}, HeaderError, "expected plain names"),
        ({"b": "..\\two.safetensors"}, HeaderError, "expected plain names"),
        ({"b": "deeper/two.safetensors"}, HeaderError, "expected shards beside the index"),
        ({"b": "two.safetensors\0"}, HeaderError, "expected plain names"),
        ({"b": ""}, HeaderError, "expected plain names"),
        ({"b": 2}, HeaderError, "expected the file name of b"),
        ({"../b": "two.safetensors"}, HeaderError, "expected plain names"),
        ({"b": "two.bin"}, PickleRefused, "is a pickle"),
    ],
)
def test_an_index_that_lies(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], text: str
) -> None:
    index = sharded(tmp_path / "model", TWO, **changes)
    with pytest.raises(kind, match=text):
        Checkpoint.open(index)


def test_tensors_that_the_index_does_not_name(tmp_path: Path) -> None:
    more = {**TWO, "two.safetensors": {"b": torch.ones(3), "extra": torch.ones(1)}}
    with pytest.raises(TensorMismatch, match="1 not in the index, the first is extra"):
        Checkpoint.open(sharded(tmp_path, more, extra=None))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    both = {"one.safetensors": {"a": torch.ones(2), "b": torch.ones(3)}, **TWO}
    both["one.safetensors"] = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(HeaderError, match="expected b once, found one.*two"):
        Checkpoint.open(sharded(tmp_path, both))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "x"}',
     '{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "\ufeff{}"],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    index = sharded(tmp_path, TWO)
    index.write_text(text)
    with pytest.raises(HeaderError, match=r"index\.json cannot be used"):
        Checkpoint.open(index)


def test_an_index_too_long_to_be_one(tmp_path: Path) -> None:
    index = sharded(tmp_path, TWO)
    os.truncate(index, MAX_HEADER_BYTES + 1)
    with pytest.raises(HeaderError, match="an index of at most"):
        Checkpoint.open(index)


def test_a_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, path)
    early, late = Checkpoint.open(path), Checkpoint.open(path)
    early.read("a")
    os.truncate(path, path.stat().st_size - 100)
    for checkpoint in (early, late):
        for name in ("a", "b"):
            with pytest.raises(CheckpointChanged, match="changed while it was in use"):
                checkpoint.read(name)
        with pytest.raises(CheckpointChanged):
            checkpoint.read_rows("b", [0])
        with pytest.raises(CheckpointChanged):
            checkpoint.check_unchanged()
        checkpoint.close()


def test_a_file_exchanged_or_removed_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    with Checkpoint.open(path) as checkpoint:
        checkpoint.check_unchanged()
        save_file({"a": torch.ones(10)}, tmp_path / "new")
        os.utime(tmp_path / "new", ns=(0, path.stat().st_mtime_ns))
        (tmp_path / "new").replace(path)
        with pytest.raises(CheckpointChanged, match="another file"):
            checkpoint.check_unchanged()
        with pytest.raises(CheckpointChanged, match="another file"):
            checkpoint.read("a")
        path.unlink()
        with pytest.raises(CheckpointError, match="No such file"):
            checkpoint.check_unchanged()
