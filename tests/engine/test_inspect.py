"""Descriptions of files: right, complete, and made in a fraction of a second."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.inspect import inspect
from penstock.errors import CheckpointError
from tests.engine import golden
from tests.engine.families.wan.test_structure import I2V_14B

SIZES = {"F16": 2, "F8_E4M3": 1, "F32": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m")


def original_14b() -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the official I2V 14B file."""
    shapes = KINDS["transformer"].shapes(I2V_14B)
    names = golden.original_names("transformer", list(shapes))
    return {names[name]: shape for name, shape in shapes.items()}


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A safetensors file with a true header and a hole instead of data."""
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = place + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (200 << 20, 200 << 20))  # more is refused by the system
from pathlib import Path
from penstock.engine.inspect import inspect

def read_so_far():
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

before = read_so_far()
found = inspect(Path(sys.argv[1])).components[0]
print(json.dumps({
    "read_bytes": read_so_far() - before,
    "peak_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,
    "torch": "torch" in sys.modules,
    "parameters": found.parameters, "family": found.family, "usable": found.usable,
    "format": found.format, "nbytes": found.nbytes,
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak in /proc")
@pytest.mark.parametrize(
    "dtype, label, least", [("F16", "fp16", 32e9), ("F8_E4M3", "fp8 raw", 16e9)]
)
def test_the_real_size_by_its_header_and_in_200_mb(tmp_path, dtype, label, least):
    tensors = {name: (dtype, shape) for name, shape in original_14b().items()}
    path = write_sparse(tmp_path / "x.safetensors", tensors)
    assert path.stat().st_size > least
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["family"] == "Wan2.1 I2V 14B"
    assert found["usable"]
    assert round(found["parameters"] / 1e9, 3) == 16.395
    assert (found["format"], found["nbytes"] > least) == (label, True)
    assert not found["torch"]
    assert found["peak_mb"] < 200
    assert found["read_bytes"] < 4e6


def test_one_file(tmp_path, model):
    tensors = golden.load(model, "transformer")
    made = golden.make(tensors, golden.original_names("transformer", list(tensors)), "comfy old")
    path = made.save(tmp_path / "x.safetensors")
    found = inspect(path)
    (part,) = found.components
    assert (part.component, part.naming, part.format) == ("transformer", "Wan", "fp8 per tensor")
    assert part.family == "Wan2.1 I2V (256 wide, 2 layers)"
    assert part.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {row.format for row in part.layers} == {"fp8 per tensor", "bf16"}
    assert sum(row.tensors for row in part.layers) == len(tensors)
    assert found.arguments == ("--transformer", str(path))
    text = "\n".join(part.lines())
    assert f"penstock generate --transformer {path}" in text
    assert "fp8 per tensor" in text


def test_what_is_missing_and_unknown_is_listed(tmp_path, model):
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, "bf16")
    del made.file["blocks.1.norm3.bias"]
    made.file["blocks.0.surprise"] = torch.zeros(3)
    made.file["blocks.0.norm3.weight"] = torch.zeros(7)
    (part,) = inspect(made.save(tmp_path / "x.safetensors")).components
    assert part.missing == ("blocks.1.norm2.bias",)
    assert part.unknown == ("blocks.0.surprise",)
    assert part.misshaped == ("blocks.0.norm2.weight",)
    assert not part.usable
    assert part.arguments == ()
    text = "\n".join(part.lines())
    assert "1 missing: blocks.1.norm2.bias" in text
    assert "use it" not in text


def test_model_folder_and_component_folder(tmp_path, model):
    found = inspect(model)
    assert [part.component for part in found.components] == [
        "transformer", "text_encoder", "vae", "image_encoder",
    ]  # fmt: skip
    assert found.arguments == ("--model", str(model))
    assert found.lines()[-1] == f"use it: penstock generate --model {model}"
    assert inspect(model / "vae").components[0].component == "vae"


def test_half_a_model_is_described_with_its_problem(tmp_path, model):
    copy = tmp_path / "m"
    for part in ("transformer", "vae"):
        (copy / part).mkdir(parents=True)
        for path in (model / part).iterdir():
            os.link(path, copy / part / path.name)
    os.link(model / "model_index.json", copy / "model_index.json")
    found = inspect(copy)
    assert {part.component for part in found.components} == {"transformer", "vae"}
    assert "no text encoder" in found.problem
    assert found.lines()[-1].startswith("not a whole model: ")


def test_what_is_no_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError):
        inspect(tmp_path)
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "none.gguf")
