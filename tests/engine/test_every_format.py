"""Each way in which people store a transformer: described, planned, run, packed anew, and with a
LoRA on top. `benchmarks.every_format` goes through all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import golden
from tests.engine.every_format import examine

SPELLINGS = (
    "raw e5m2", "comfy new e5m2", "comfy convrot 64", "comfy nvfp4", "comfy mxfp8", "torchao int8",
    "bitsandbytes nf4 nested", "gguf MXFP4", "gguf TQ2_0",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_described_planned_run_and_packed(spelling: str, model: Path, tmp_path: Path) -> None:
    found = examine(model, spelling, tmp_path)
    assert found.recommended
    assert found.same, "decoded, it is another model"
    assert found.packed_cosine > 0.99
    assert found.changed_by_lora
