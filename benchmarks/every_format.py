"""Every way in which a transformer is stored, on a tiny random model: what `inspect`, `plan`,
`generate`, `pack` and a LoRA on top make of it, and what is said of those that are not run.

    python -m benchmarks.every_format [--only raw,comfy,...]

Files are made by their own tools where these write them on a CPU, else by hand in their spelling;
the blocks of GGUF's types that the gguf package only reads are random. Latents are compared with
those of the values that the file stands for, decoded by its library and stored plain; the LoRA
changes every matrix of the blocks. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.engine.inspect import inspect
from penstock.errors import PenstockError
from penstock.formats.gguf import GGUF_FORMATS
from tests.engine import golden
from tests.engine.every_format import examine

SPELLINGS = (
    "bf16", "fp16", "fp32", "raw fp8", "everything fp8", "raw e5m2", "comfy old", "comfy old exact",
    "comfy old e5m2", "comfy new", "comfy new e5m2", "comfy metadata", "comfy int8",
    "comfy int8 rows", "comfy convrot 16", "comfy convrot 64", "comfy convrot 256", "comfy nvfp4",
    "comfy mxfp8", "lightx2v int8", "lightx2v fp8", "torchao int8", "torchao fp8", "quanto int8",
    "quanto fp8", "bitsandbytes nf4", "bitsandbytes nf4 nested",
)  # fmt: skip
"""Of `golden.make`; quanto's 4 bits tell no shapes, and need the model's folder."""

File = Callable[[str, Tensor], dict[str, Tensor]]
"""From a matrix of a block to the tensors that are stored for it."""


def rows(model: Path, only: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What is run."""
    gguf = [f"gguf {each.ggml_type}" for each in GGUF_FORMATS]
    for spelling in (*SPELLINGS, "gguf F16", *gguf):
        if not only or spelling.startswith(only):
            with tempfile.TemporaryDirectory() as folder:
                yield {"stored": spelling} | asdict(examine(model, spelling, Path(folder)))


def refusals(model: Path, only: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What is known and not run, and what is said of it."""
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    for what, store in REFUSED.items():
        if only and not what.startswith(only):
            continue
        file: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer = names[name].removesuffix(".weight")
            plain = not golden.is_block_matrix(name, tensor)
            file |= {names[name]: tensor} if plain else store(layer, tensor)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            save_file({key: value.contiguous() for key, value in file.items()}, path)
            yield {"stored": what, "said": _said(path)}


def _said(path: Path) -> str:
    try:
        found = inspect(path)
    except PenstockError as error:
        return str(error)
    return f"NOT REFUSED: {found}"


def _bitsandbytes_fp4(layer: str, tensor: Tensor) -> dict[str, Tensor]:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor, blocksize=64, quant_type="fp4")
    said = {f"{layer}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{layer}.weight": packed} | said


def _bitsandbytes_int8(layer: str, tensor: Tensor) -> dict[str, Tensor]:
    small, scale = golden.scaled(tensor, torch.int8, True)
    return {f"{layer}.weight": small, f"{layer}.SCB": 127 * scale.flatten()}


def _torchao_zeros(layer: str, tensor: Tensor) -> dict[str, Tensor]:
    made = golden.make({layer: tensor}, {layer: layer}, "bf16").file
    small, scale = golden.scaled(made[layer], torch.int8, True)
    zeros = torch.ones(len(small), 1, dtype=torch.int8)
    parts = {"_qdata": small, "_scale": scale, "_zero_point": zeros}
    return {f"{layer}._weight{key}": value for key, value in parts.items()}


def _torchao_groups(layer: str, tensor: Tensor) -> dict[str, Tensor]:
    groups = tensor.float().view(len(tensor), -1, 32)
    scale = groups.abs().amax(2) / 7
    small = (groups / scale[:, :, None]).round().to(torch.int8).view(tensor.shape)
    zeros = torch.zeros(scale.shape, dtype=torch.int8)
    parts = {"_qdata": small, "_scale": scale, "_zero_point": zeros}
    return {f"{layer}._weight{key}": value for key, value in parts.items()}


def _comfy(layout: str, kind: str) -> File:
    """By comfy-kitchen, with the name ``kind`` beside it."""

    def store(layer: str, tensor: Tensor) -> dict[str, Tensor]:
        from comfy_kitchen import tensor as kitchen

        chosen = getattr(kitchen, layout)
        codes, params = chosen.quantize(tensor.float())
        parts = chosen.state_dict_tensors(codes, params)
        said = {f"{layer}.comfy_quant": golden._json_tensor({"format": kind})}
        return {f"{layer}.weight{key}": value for key, value in parts.items()} | said

    return store


def _named(kind: str) -> File:
    """What needs calibration, by its name alone."""

    def store(layer: str, tensor: Tensor) -> dict[str, Tensor]:
        small, scale = golden.scaled(tensor, torch.int8, True)
        said = {f"{layer}.comfy_quant": golden._json_tensor({"format": kind})}
        return {f"{layer}.weight": small, f"{layer}.weight_scale": scale} | said

    return store


REFUSED: Mapping[str, File] = {
    "torchao int8, zero points": _torchao_zeros,
    "torchao int4, in groups": _torchao_groups,
    "bitsandbytes fp4": _bitsandbytes_fp4,
    "bitsandbytes int8": _bitsandbytes_int8,
    "comfy W4A8": _comfy("AsymW4A8Int8Layout", "w4a8_int8"),
    "comfy W4A4, rotated": _comfy("TensorCoreConvRotW4A4Layout", "convrot_w4a4"),
    "comfy SVDQuant": _named("svdquant_w4a4"),
    "comfy AWQ": _named("awq_w4a16"),
    "comfy int8 by blocks": _named("int8_blockwise"),
}


def main() -> None:
    """Go through all, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="those whose names begin so")
    options = parser.parse_args()
    only = tuple(name for name in options.only.split(",") if name)
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "refused": []}
    with tempfile.TemporaryDirectory() as folder:
        model = golden.write_model(Path(folder) / "m", image_to_video=False)
        for kind, each in (("rows", rows(model, only)), ("refused", refusals(model, only))):
            for row in each:
                found[kind].append(row)
                print(row, flush=True)
    print(json.dumps({"torch": torch.__version__} | found))


if __name__ == "__main__":
    main()
