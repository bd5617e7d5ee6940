"""`penstock.load_pipeline` of any folder of diffusers: what it makes, and what it holds."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import penstock
from penstock.errors import CheckpointError, OverBudget
from tests.engine.attach.tiny_ltx2 import ltx2, made, wanted
from tests.meter import StorageMeter
from tests.versions import TRANSFORMERS_4

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="LTX-2 is newer")
ROOM = "16MiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline."""
    path = tmp_path_factory.mktemp("ltx2")
    ltx2().save_pretrained(path)
    return path


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_bits_of_the_loaded_pipeline_at_the_least_budget(folder: Path) -> None:
    with pytest.raises(OverBudget) as refused:
        penstock.load_pipeline(folder, vram=1, ram=ROOM)
    pipe = _quiet(penstock.load_pipeline(folder, vram=refused.value.need_bytes, ram=ROOM))
    assert type(pipe).__name__ == "LTX2Pipeline"
    assert _equal(made(pipe), wanted())
    assert _equal(made(pipe), wanted())
    report = vars(pipe)["_penstock_attached"].report
    assert report.peak_vram_bytes <= refused.value.need_bytes
    assert report.disk_bytes == 0 and report.ram_bytes == 0
    penstock.detach(pipe)


def test_no_network_is_ever_held_whole(folder: Path) -> None:
    """Opening makes no weights at all; a call makes what the budgets hold."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(OverBudget) as refused:
        penstock.load_pipeline(folder, vram=1, ram=ROOM)
    with StorageMeter() as meter:
        pipe = _quiet(penstock.load_pipeline(folder, vram=refused.value.need_bytes, ram=1 << 19))
    assert meter.peak < weights.stat().st_size / 2
    penstock.detach(pipe)


def test_what_a_class_keeps_in_fp32_is_in_fp32(folder: Path, tmp_path: Path) -> None:
    """As diffusers loads it, though the files are in bf16."""
    from diffusers import WanTransformer3DModel

    from penstock.engine.attach.fileweights import FileWeights, kept_in_fp32
    from penstock.engine.model.binding import skeleton

    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2,
                                  text_dim=16, ffn_dim=32, in_channels=4,
                                  out_channels=4)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    bare = skeleton(WanTransformer3DModel, dict(model.config))
    with ExitStack() as stack:
        files = FileWeights(bare, tmp_path, stack, kept_in_fp32(bare, tmp_path))
        types = {name: p.dtype for name, p in bare.named_parameters()}
        assert types == {name: p.dtype for name, p in loaded.named_parameters()}
        assert set(types.values()) == {torch.float32, torch.bfloat16}
        for name, p in loaded.named_parameters():
            assert torch.equal(files.value(bare.get_parameter(name)), p)
    assert {p.dtype for p in bare.parameters()} == {torch.float32}


def test_a_format(folder: Path) -> None:
    """A pack of the transformer alone, as an attached pipeline has it."""
    pipe = ltx2()
    with penstock.attach(pipe, vram=ROOM, ram=ROOM, format="int8"):
        expected = made(pipe)
    opened = _quiet(penstock.load_pipeline(folder, vram=ROOM, ram=ROOM, format="int8"))
    assert _equal(made(opened), expected) and not _equal(expected, wanted())
    penstock.detach(opened)


def _index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    _index(broken, _class_name="PipelineOfTomorrow")
    with pytest.raises(CheckpointError, match=r"(?s)does not have.*PipelineOfTomorrow"):
        penstock.load_pipeline(broken, vram=ROOM, ram=ROOM)
    _index(broken, _class_name=["my.code", "Evil"])
    with pytest.raises(CheckpointError, match=r"(?s)Code that comes with a model is not run"):
        penstock.load_pipeline(broken, vram=ROOM, ram=ROOM)
    _index(broken, _class_name="LTX2Pipeline")
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)vae holds no AutoencoderKLLTX2Video"):
        penstock.load_pipeline(broken, vram=ROOM, ram=ROOM)
