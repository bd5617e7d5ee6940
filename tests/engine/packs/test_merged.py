"""``pack --lora``: the sum is made in fp32 and rounded once, into what is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.lora.file import Lora
from penstock.engine.packs.pack import pack
from penstock.formats.formats import get_format
from penstock.quant.arithmetic import quantise
from tests.engine import lora_files as made
from tests.engine.lora import kinds

NAME = "blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("m"), dtype=torch.bfloat16, image_to_video=False,
        vae={"base_dim": 8},
    )  # fmt: skip


def _packed(folder: Path, wanted: str, lora: Path, to: Path) -> dict[str, torch.Tensor]:
    pack(locate(folder), wanted, to, loras=[Lora(lora, 0.5)])
    (file,) = (to / "transformer").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", ["lora", "dora by inputs", "boft"])
def test_the_sum_of_a_bf16_matrix_is_rounded_once(kind: str, folder: Path, tmp_path: Path) -> None:
    source = locate(folder).streamed
    modules = kinds.some_modules(source.shapes)
    lora = kinds.make(kind, source.shapes, modules).write(tmp_path / "l.safetensors")
    whole = _packed(folder, "fp32", lora, tmp_path / "whole")
    (file,) = (folder / "transformer").glob("*.safetensors")
    plain = load_file(file)
    changed = [f"{module}.weight" for module in modules]
    # What fp32 keeps of the sums, bf16 would have lost
    assert any(not torch.equal(whole[n], whole[n].bfloat16().float()) for n in changed)
    for wanted in ("int8", "gguf-q8_0", "bf16"):
        stored = _packed(folder, wanted, lora, tmp_path / wanted)
        for name in changed:
            expected = quantise(get_format(wanted), whole[name], name)
            for suffix, tensor in expected.items():
                found = stored[name.removesuffix("weight") + suffix]
                assert torch.equal(found.view(tensor.dtype), tensor), (wanted, name, suffix)
        assert torch.equal(stored["proj_out.weight"], plain["proj_out.weight"])


def test_a_pair_is_added_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    source = locate(folder).streamed
    pairs = made.pairs(source, [NAME.removesuffix(".weight")])
    lora = made.write_comfy(tmp_path / "l.safetensors", pairs)
    whole = _packed(folder, "fp32", lora, tmp_path / "whole")
    (file,) = (folder / "transformer").glob("*.safetensors")
    down, up = pairs[NAME.removesuffix(".weight")]
    exact = load_file(file)[NAME].double() + 0.5 * (up.double() @ down.double())
    step = 2.0**-24  # half a unit in the last place of an fp32 of magnitude 1 to 2
    assert (whole[NAME].double() - exact).abs().max() <= 4 * step * exact.abs().max()
