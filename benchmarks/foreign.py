"""Transformers in formats that penstock reads and does not write, written as their tools do.

gguf, comfy-kitchen, bitsandbytes and torchao quantise; what the gguf package only reads is made by
`benchmarks.kquants` and `benchmarks.grids`. Each file has the model's config.json beside it, for a
file's own shapes do not tell heads of another width than Wan's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from gguf import quants

from benchmarks import grids, kquants
from tests.engine import golden

BY_GGUF = ("gguf-q5_1", "gguf-q5_0", "gguf-q4_1", "gguf-q4_0", "gguf-mxfp4")
OURS = ("gguf-iq4_nl", "gguf-nvfp4")
IN_BLOCKS_OF_256: Mapping[str, str] = MappingProxyType({
    "gguf-q6_k": "Q8_0", "gguf-q5_k": "Q5_1", "gguf-q4_k": "Q5_0", "gguf-q3_k": "IQ4_NL",
    "gguf-q2_k": "IQ4_NL", "gguf-iq4_xs": "IQ4_NL", "gguf-tq2_0": "Q4_0", "gguf-tq1_0": "Q4_0",
    "gguf-iq3_s": "IQ4_NL", "gguf-iq3_xxs": "IQ4_NL", "gguf-iq2_s": "IQ4_NL",
    "gguf-iq2_xs": "IQ4_NL", "gguf-iq2_xxs": "IQ4_NL", "gguf-iq1_m": "IQ4_NL",
    "gguf-iq1_s": "IQ4_NL",
})  # fmt: skip
"""And the types in blocks of 32 that stand in their place where rows are not whole blocks, as in
the small trained model but for the end of its feed-forward: those that llama.cpp takes
(`src/llama-quant.cpp`)."""

SPELLED: Mapping[str, str] = MappingProxyType({
    "fp8-e5m2": "raw e5m2", "nvfp4": "comfy nvfp4", "mxfp8": "comfy mxfp8",
    "nf4-nested": "bitsandbytes nf4 nested",
})  # fmt: skip
"""In safetensors, by `golden.make`."""

TORCHAO: Mapping[str, str] = MappingProxyType(
    {"torchao-int8": "Int8WeightOnlyConfig", "torchao-fp8": "Float8WeightOnlyConfig"}
)

ALL = (*BY_GGUF, *OURS, *SPELLED, *TORCHAO, *IN_BLOCKS_OF_256)


def write(model: Path, name: str, folder: Path) -> Path:
    """The transformer of the model in folder ``model`` in the format ``name`` (of `ALL`), in
    ``folder``, written once: what `Files.transformer` takes."""
    made = folder / name
    if not made.exists():
        new = made.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        if name in TORCHAO:
            _by_diffusers(model / "transformer", new, TORCHAO[name])
        else:
            shutil.copy(model / "transformer" / "config.json", new)
            _by_hand(model, name, new)
        new.replace(made)
    return next((each for each in made.glob("transformer.*")), made)


def _by_hand(model: Path, name: str, folder: Path) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    if name in SPELLED:
        golden.make(tensors, names, SPELLED[name]).save(folder / "transformer.safetensors")
        return
    kind = name.removeprefix("gguf-").upper()
    narrow = IN_BLOCKS_OF_256.get(name)
    golden.write_gguf(
        folder / "transformer.gguf", tensors, names, kind, "wan", _quantised, narrow=narrow
    )


def _quantised(weight: Any, ggml_type: Any) -> Any:
    """As `gguf.quants.quantize`, and for the types that it does not write."""
    for made in (kquants, grids):
        if ggml_type.name in made.KINDS:
            return made.quantise(torch.from_numpy(weight), ggml_type.name).numpy()
    return quants.quantize(weight, ggml_type)


def _by_diffusers(source: Path, target: Path, kind: str) -> None:
    """What `save_pretrained` leaves of a transformer that torchao has quantised."""
    from diffusers import TorchAoConfig, WanTransformer3DModel
    from torchao import quantization

    network = WanTransformer3DModel.from_pretrained(
        source, quantization_config=TorchAoConfig(getattr(quantization, kind)()), torch_dtype="auto"
    )
    network.save_pretrained(target)
