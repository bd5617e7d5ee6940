"""What is done with a transformer in any of the ways in which people store one: it is described,
planned, run, packed anew, and run with a LoRA on top."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from benchmarks.dequantise import gguf_blocks
from penstock.engine.files.locate import Files, locate
from penstock.engine.inspect import inspect
from penstock.engine.packs.pack import pack
from penstock.formats.formats import get_format
from penstock.formats.gguf import Gguf
from tests.engine import golden, lora_files
from tests.engine.running import a_request, an_engine

COMPUTED_IN = {"fp16": torch.float16, "f16": torch.float16, "fp32": torch.float32}
"""What plain files make of it; others are computed in bf16."""


@dataclass(frozen=True)
class Found:
    """What came of one way of storing.

    Attributes:
        label: its name, as `penstock inspect` gives it.
        recommended: inspect calls it usable, and gives the flag to use it by.
        same: less than the whole was held, so that each step read and decoded every block, and the
            latents were to the bit those of the values that the file stands for.
        packed_cosine: of the latents of its int8 pack, with its own.
        changed_by_lora: a LoRA on top gave others, all finite.
    """

    label: str
    recommended: bool
    same: bool
    packed_cosine: float
    changed_by_lora: bool


def stored(model: Path, spelling: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A transformer's file, and the values that it stands for.

    Args:
        spelling: of `golden.make`, or "gguf TYPE", which the gguf package writes or, of a type
            that it only reads, random blocks.
    """
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    if not spelling.startswith("gguf "):
        made = golden.make(tensors, names, spelling)
        return made.save(folder / "x.safetensors"), made.values
    path, kind = folder / "x.gguf", spelling.removeprefix("gguf ")

    def quantised(data: Any, ggml: GGMLQuantizationType) -> Any:
        try:
            return golden.quants.quantize(data, ggml)
        except NotImplementedError:
            fmt = get_format(f"gguf-{kind.lower()}")
            assert isinstance(fmt, Gguf)
            return gguf_blocks(fmt, *data.shape).numpy()

    return path, golden.write_gguf(path, tensors, names, kind, "wan", quantised)


def latents(model: Path, transformer: Path | None = None, **options: Any) -> torch.Tensor:
    """Of a small job, all of them finite."""
    files = Files(transformer=transformer)
    with an_engine(model, files=files, **options) as engine:
        engine.plan(a_request(steps=2))
        found = engine.submit(a_request(steps=2)).result().latents
    assert found is not None and bool(found.isfinite().all())
    return found


def examine(model: Path, spelling: str, folder: Path) -> Found:
    """Do it all with ``spelling``; files are made in ``folder``.

    Raises:
        PenstockError: what was refused.
    """
    path, values = stored(model, spelling, folder)
    described = inspect(path).components[0]  # type: ignore[union-attr]
    found = latents(model, path, vram="24MiB")
    plain = folder / "plain.safetensors"
    computed = COMPUTED_IN.get(spelling.removeprefix("gguf ").lower(), torch.bfloat16)
    # ComfyUI-GGUF's files hold the modulation in fp32, and nothing rounds it.
    kept = "scale_shift_table" if path.suffix == ".gguf" else "none"
    save_file(
        {n: v.float() if n.endswith(kept) else v.to(computed) for n, v in values.items()}, plain
    )
    pack(locate(model, Files(transformer=path)), "int8", folder / "packed")
    similar = torch.nn.functional.cosine_similarity(
        latents(folder / "packed").flatten().double(), found.flatten().double(), dim=0
    )
    source = locate(model, Files(transformer=path)).streamed
    layers = lora_files.pairs(source, lora_files.linears(source, outside=False))
    style = lora_files.write_comfy(folder / "style.safetensors", layers)
    return Found(
        label=str(described.format),
        recommended=described.usable and described.arguments == ("--transformer", str(path)),
        same=torch.equal(found, latents(model, plain)),
        packed_cosine=float(similar),
        changed_by_lora=not torch.equal(latents(model, path, loras=[style]), found),
    )
