"""Bytes that the planner states for weight formats, against the formats themselves."""

from __future__ import annotations

import pytest

from penstock.engine.families.wan.builtin import BUILTIN
from penstock.engine.family.protocol import builtin
from penstock.errors import ProfileError
from penstock.profiles.formats import FORMATS, get_format
from penstock.quant.format import FORMATS as STORED
from penstock.quant.paths import scratch_bytes
from tests.quant.weights import storage_bytes

SHAPES = [(5120, 5120), (13824, 5120), (5120, 13824), (512, 256)]
CUDA = "cuda"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_formats_store_them(name: str, shape: tuple[int, int]) -> None:
    stated, stored = FORMATS[name], STORED[name]
    assert sum(stated.tensor_bytes(shape)) == storage_bytes(stored.storage(shape, "BF16"))
    assert stated.workspace_bytes(shape) >= stored.workspace_bytes(shape, CUDA)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp16"])
def test_the_scratch_of_the_true_model(name: str) -> None:
    stored = [(STORED[name], shape) for shape in SHAPES]
    found = builtin("wan2.1-i2v-14b", name).transformer.storage.scratch_bytes
    assert found == scratch_bytes(stored, "BF16")


def test_unknown_names() -> None:
    with pytest.raises(ProfileError, match="int3"):
        get_format("int3")
    with pytest.raises(ProfileError, match="no built-in"):
        builtin("sora", "bf16")
    assert set(BUILTIN) == {"wan2.1-i2v-14b"}
