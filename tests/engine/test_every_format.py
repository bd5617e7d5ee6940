"""Each way in which people store a transformer: described, planned, run, packed anew, and with a
LoRA on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.files.locate import Files, locate
from penstock.engine.inspect import inspect
from penstock.engine.packs.pack import pack
from tests.engine import golden, lora_files
from tests.engine.running import a_request, an_engine

SPELLINGS = (
    "raw e5m2", "comfy new e5m2", "comfy convrot 64", "comfy nvfp4", "comfy mxfp8", "torchao int8",
    "bitsandbytes nf4 nested", "gguf MXFP4", "gguf TQ2_0",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


def stored(model: Path, spelling: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A transformer's file, and the values that it stands for."""
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    if spelling.startswith("gguf "):
        path = folder / "x.gguf"
        return path, golden.write_gguf(path, tensors, names, spelling.removeprefix("gguf "), "wan")
    made = golden.make(tensors, names, spelling)
    return made.save(folder / "x.safetensors"), made.values


def latents(model: Path, transformer: Path | None = None, **options: Any) -> torch.Tensor:
    files = Files(transformer=transformer)
    with an_engine(model, files=files, **options) as engine:
        engine.plan(a_request(steps=2))
        found = engine.submit(a_request(steps=2)).result().latents
    assert found is not None and bool(found.isfinite().all())
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_described_planned_run_and_packed(spelling: str, model: Path, tmp_path: Path) -> None:
    path, values = stored(model, spelling, tmp_path)
    described = inspect(path).components[0]  # type: ignore[union-attr]
    assert described.usable and described.arguments == ("--transformer", str(path))
    # Less than the whole: every block is read, copied and decoded at each step.
    found = latents(model, path, vram="24MiB")
    plain = tmp_path / "plain.safetensors"
    # ComfyUI-GGUF's files hold the modulation in fp32, and nothing rounds it.
    kept = "scale_shift_table" if path.suffix == ".gguf" else "none"
    save_file(
        {n: v.float() if n.endswith(kept) else v.bfloat16() for n, v in values.items()}, plain
    )
    assert torch.equal(found, latents(model, plain)), "decoded, it is another model"
    pack(locate(model, Files(transformer=path)), "int8", tmp_path / "packed")
    similar = torch.nn.functional.cosine_similarity(
        latents(tmp_path / "packed").flatten().double(), found.flatten().double(), dim=0
    )
    assert similar > 0.99
    source = locate(model, Files(transformer=path)).streamed
    layers = lora_files.pairs(source, lora_files.linears(source, outside=False))
    style = lora_files.write_comfy(tmp_path / "style.safetensors", layers)
    assert not torch.equal(latents(model, path, loras=[style]), found)
