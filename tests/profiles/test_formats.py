"""What the planner states for weight formats, against the formats themselves."""

from __future__ import annotations

import pytest

from penstock.engine.families.wan.builtin import BUILTIN
from penstock.engine.family.protocol import builtin
from penstock.errors import ProfileError
from penstock.formats.formats import FORMATS, get_format, spec_bytes
from penstock.formats.patched import Patched
from penstock.quant.arithmetic import ARITHMETIC
from penstock.quant.paths import scratch_bytes
from tests.quant.weights import storage_bytes

SHAPES = [(5120, 5120), (13824, 5120), (5120, 13824), (512, 256)]
CUDA = "cuda"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_formats_store_them(name: str, shape: tuple[int, int]) -> None:
    stored = FORMATS[name].storage(shape, "BF16")
    assert sum(map(spec_bytes, stored.values())) == storage_bytes(stored)


@pytest.mark.parametrize("name", FORMATS)
def test_the_scratch_of_the_true_model(name: str) -> None:
    stored = [(FORMATS[name], shape) for shape in SHAPES]
    found = builtin("wan2.1-i2v-14b", name).transformer.storage
    workspace = max(FORMATS[name].workspace_bytes(shape, CUDA) for shape in SHAPES[:3])
    assert found.workspace_bytes == workspace
    if FORMATS[name].plain:  # cast, a block at a time, where it is not the compute dtype
        matrices = 10 * 5120 * 5120 + 2 * 13824 * 5120
        assert found.cast_bytes == (0 if name == "bf16" else 2 * matrices)
    else:
        assert found.scratch_bytes == scratch_bytes(stored, "BF16")


def test_every_format_has_its_arithmetic() -> None:
    """As has a weight with a LoRA's change around another format, which no file holds."""
    assert {type(each) for each in FORMATS.values()} | {Patched} == set(ARITHMETIC)


def test_unknown_names() -> None:
    with pytest.raises(ProfileError, match="int3"):
        get_format("int3")
    with pytest.raises(ProfileError, match="no built-in"):
        builtin("sora", "bf16")
    assert set(BUILTIN) == {
        "wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b",
        "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
    }  # fmt: skip
