"""What penstock makes of other projects' files, beside what these make of them themselves.

    python -m benchmarks.libraries [--only values,folders,loras]

- values: a weight as a library stores it, decoded by us and by the library, in fp32 and in bf16:
  the largest difference over the largest value. Where the library's own bf16 is rounded more than
  once, ours is compared with its fp32 values rounded once as well; where it sums in fp32, both are
  compared with the same sum in fp64.
- folders: a model whose transformer (or text encoder) the real tool has quantised and saved, opened
  as a folder or as a ComfyUI root: how far its weights and the latents of two steps are from the
  plain model's, root mean square, relative.
- loras: twelve kinds of LoRA on plain, int8 and GGUF weights; resident, streamed, packed in: how
  far latents are from those of weights that LyCORIS has merged (`tests/engine/lora/kinds.py`).

All on tiny random models. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from safetensors.torch import save_file
from torch import Tensor, nn

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.files.reader import WeightReader
from penstock.engine.packs.pack import pack
from penstock.formats.formats import QuantFormat
from penstock.formats.gguf import GGUF_FORMATS
from penstock.formats.recognise import canonical_suffix, recognise
from penstock.quant.arithmetic import dequantise
from penstock.quant.values.tensors import dtype_tag
from tests.engine import golden
from tests.engine.lora import kinds, test_kinds
from tests.engine.test_folders import FOLDERS, MMGP, TEXT_FOLDERS, latents
from tests.quant.test_libraries import random_blocks
from tests.quant.weights import relative_rms, small_weight
from tests.quanto_python import python_unpack

SHAPE = (96, 1024)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """A weight as a library has stored it.

    Attributes:
        fmt: what penstock recognises it as.
        tensors: its tensors, by penstock's suffixes.
        theirs: the library's own values, in the dtype that is asked for.
        exact: the same arithmetic in fp64, where the library sums in fp32.
    """

    name: str
    library: str
    fmt: QuantFormat
    tensors: Mapping[str, Tensor]
    theirs: Callable[[torch.dtype], Tensor]
    exact: Tensor | None = None


def values(dtype: torch.dtype) -> Iterator[Stored]:
    """A weight of ``dtype`` in every format, by the library that has it."""
    weight = small_weight(*SHAPE, dtype)
    weight[3] = 0
    weight[:, 7] *= 40
    for made in (_torch, _kitchen, _torchao, _bitsandbytes, _quanto):
        yield from made(weight)
    for fmt in GGUF_FORMATS:
        blocks = random_blocks(fmt, *SHAPE)
        yield Stored(fmt.name, "gguf", fmt, {"weight": blocks}, partial(_by_gguf, fmt, blocks))


def _recognised(tensors: Mapping[str, Tensor], **said: Any) -> QuantFormat:
    return recognise({k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in tensors.items()}, **said)


def _by_gguf(fmt: Any, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    kind = GGMLQuantizationType[fmt.ggml_type]
    return torch.from_numpy(gguf_dequantize(blocks.numpy(), kind)).to(dtype)


def _torch(weight: Tensor) -> Iterator[Stored]:
    """Plain dtypes, and fp8 without scales: torch's own casts."""
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        small = weight.to(getattr(torch, name))
        yield Stored(name, "torch", _recognised({"weight": small}), {"weight": small}, small.to)


@dataclass(frozen=True)
class Layout:
    """One of comfy-kitchen's layouts, and what ComfyUI's files say of it."""

    name: str
    options: Mapping[str, Any]
    said: Mapping[str, Any]

    def write(self, weight: Tensor) -> tuple[Any, Tensor, Any, dict[str, Tensor]]:
        """The class, the codes and what belongs to them, and the tensors that a file gets."""
        layout = getattr(import_module("comfy_kitchen.tensor"), self.name)
        codes, params = layout.quantize(weight, **self.options)
        tensors = {f"weight{k}": v for k, v in layout.state_dict_tensors(codes, params).items()}
        if self.name == "TensorWiseINT8Layout":  # a scale a row stands in a column
            tensors["weight_scale"] = params.scale.reshape(-1, 1)
        return layout, codes, params, tensors


def _int8(rows: bool, rotation: int = 0) -> Layout:
    options: dict[str, Any] = {"per_channel": rows, "convrot": bool(rotation)}
    said: dict[str, Any] = {"format": "int8_tensorwise"}
    if rotation:
        options["convrot_groupsize"] = rotation
        said |= {"convrot": True, "convrot_groupsize": rotation}
    return Layout("TensorWiseINT8Layout", options, said)


KITCHEN: Mapping[str, Layout] = MappingProxyType({
    "fp8": Layout("TensorCoreFP8Layout", {}, {"format": "float8_e4m3fn"}),
    "fp8-e5m2": Layout(
        "TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}, {"format": "float8_e5m2"}
    ),
    "int8": _int8(rows=False),
    "int8, rows": _int8(rows=True),
    "int8-convrot, 16": _int8(rows=True, rotation=16),
    "int8-convrot, 64": _int8(rows=True, rotation=64),
    "int8-convrot, 256": _int8(rows=True, rotation=256),
    "nvfp4": Layout("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}),
    "mxfp8": Layout("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}),
})  # fmt: skip


def _kitchen(weight: Tensor) -> Iterator[Stored]:
    for name, each in KITCHEN.items():
        layout, codes, params, tensors = each.write(weight)

        def theirs(
            dtype: torch.dtype, layout: Any = layout, codes: Tensor = codes, params: Any = params
        ) -> Tensor:
            found: Tensor = layout.dequantize(codes, replace(params, orig_dtype=dtype))
            return found

        exact, rotation = None, each.said.get("convrot_groupsize")
        if rotation is not None:
            exact = _turned_back(codes, params.scale, rotation)
        fmt = _recognised(tensors, comfy=dict(each.said))
        yield Stored(name, "comfy-kitchen", fmt, tensors, theirs, exact)


def _turned_back(codes: Tensor, scale: Tensor, size: int) -> Tensor:
    """ConvRot's values in fp64."""
    made = import_module("comfy_kitchen.tensor.int8_utils")
    turn: Tensor = made._build_hadamard(size, dtype=torch.float64)
    scaled = codes.double() * scale.double().reshape(-1, 1)
    return (scaled.view(len(codes), -1, size) @ turn).view(codes.shape)


def _layer(weight: Tensor) -> Any:
    """A model of one linear layer of that weight."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False).to(weight.dtype)
    linear.weight.data.copy_(weight)
    return nn.Sequential(linear)


def _torchao(weight: Tensor) -> Iterator[Stored]:
    from torchao import quantization

    for name, kind in (("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")):
        layer = _layer(weight)
        quantization.quantize_(layer, getattr(quantization, kind)())
        stored: Any = layer[0].weight
        spelled = {"_weight_qdata": stored.qdata, "_weight_scale": stored.scale}
        if hasattr(stored, "zero_point"):
            spelled["_weight_zero_point"] = stored.zero_point
        tensors = {"weight": stored.qdata, "weight_scale": stored.scale}

        def theirs(dtype: torch.dtype, stored: Any = stored) -> Tensor:
            found: Tensor = stored.dequantize(output_dtype=dtype)
            return found

        yield Stored(name, "torchao", _recognised(spelled), tensors, theirs)


def _bitsandbytes(weight: Tensor) -> Iterator[Stored]:
    from bitsandbytes import functional

    for nested in (False, True):
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        held = {"weight": packed} | {
            f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
        }
        said = json.loads(bytes(held["weight.quant_state.bitsandbytes__nf4"].tolist()))
        tensors = {s: t for k, t in held.items() if (s := canonical_suffix(k)) is not None}

        def theirs(dtype: torch.dtype, packed: Tensor = packed, state: Any = state) -> Tensor:
            state.dtype = dtype
            found: Tensor = functional.dequantize_4bit(packed, state)
            return found

        fmt = _recognised(held, state=said)
        yield Stored("nf4, nested" if nested else "nf4", "bitsandbytes", fmt, tensors, theirs)


def _quanto(weight: Tensor) -> Iterator[Stored]:
    from optimum import quanto

    for kind in ("qint8", "qfloat8", "qint4"):
        model = _layer(weight)
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        tensors = {
            suffix: tensor
            for key, tensor in model.state_dict().items()
            if (suffix := canonical_suffix(key.removeprefix("0."))) is not None
        }
        stored: Any = model[0].weight

        def theirs(dtype: torch.dtype, stored: Any = stored) -> Tensor:
            """It decodes to the dtype of its scales, and to no other."""
            found: Tensor = stored.dequantize()
            return found.to(dtype)

        yield Stored(f"quanto {kind}", "optimum-quanto", _recognised(tensors), tensors, theirs)


def compared(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The largest differences of each format in ``dtype``, over the largest value."""
    for each in values(dtype):
        ours = dequantise(each.fmt, each.tensors, SHAPE, dtype)
        theirs = each.theirs(dtype)[: SHAPE[0], : SHAPE[1]]
        row = {
            "format": each.name, "library": each.library, "label": each.fmt.label,
            "dtype": str(dtype).removeprefix("torch."), "difference": apart(ours, theirs),
        }  # fmt: skip
        if row["difference"] and dtype != torch.float32:
            once = each.theirs(torch.float32)[: SHAPE[0], : SHAPE[1]].to(dtype)
            row["rounded_once"] = apart(ours, once)
        if each.exact is not None:
            row["ours_off"] = apart(ours, each.exact)
            row["theirs_off"] = apart(theirs, each.exact)
        yield row


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest value of what is wanted. NaN equals NaN, and
    infinity itself: some libraries make these of a row of zeros, and blocks at random hold them."""
    ours, theirs = found.double(), wanted.double()
    same = ours.eq(theirs) | (ours.isnan() & theirs.isnan())
    largest = theirs[theirs.isfinite()].abs().max()
    return float((ours - theirs).abs().masked_fill(same, 0.0).max() / largest)


def _comfy_root(model: Path, folder: Path, write: Callable[[Path], object]) -> Path:
    """The model's parts as ComfyUI keeps them, the transformer written by ``write`` without its
    ending; the path without an ending is what it is given."""
    root = folder / "ComfyUI" / "models"
    for part, place in (("text_encoder", "text_encoders"), ("vae", "vae")):
        shutil.copytree(model / part, root / place / "x")
    for path in (model / "tokenizer").iterdir():
        shutil.copy(path, root / "text_encoders" / "x")
    transformer = root / "diffusion_models" / "x"
    transformer.mkdir(parents=True)
    shutil.copy(model / "transformer" / "config.json", transformer)
    write(transformer / "transformer")
    return root.parent


def _by_kitchen(model: Path, layout: Layout, path: Path) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    file: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not golden.is_block_matrix(name, tensor):
            file[names[name]] = tensor
            continue
        layer = names[name].removesuffix(".weight")
        file |= {f"{layer}.{k}": v for k, v in layout.write(tensor)[3].items()}
        said = json.dumps(dict(layout.said)).encode()
        file[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    save_file({k: v.contiguous() for k, v in file.items()}, path.with_suffix(".safetensors"))


def _gguf(model: Path, kind: str, path: Path) -> None:
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    golden.write_gguf(path.with_suffix(".gguf"), tensors, names, kind, "wan")


def _by_mmgp(model: Path, kind: str, path: Path) -> None:
    target = path.with_suffix(".safetensors")
    words = [sys.executable, "-c", MMGP, str(model / "transformer"), str(target), kind]
    subprocess.run(words, check=True, capture_output=True)


def folders(model: Path, scratch: Path) -> Iterator[tuple[str, str, Path]]:
    """What was stored by what, the part that it is, and the folder to open."""
    tools: Mapping[str, Callable[[Path, Path], object]] = FOLDERS | TEXT_FOLDERS
    for kind, write in tools.items():
        part = "text_encoder" if kind in TEXT_FOLDERS else "transformer"
        folder = scratch / kind
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns(part))
        write(model / part, folder / part)
        tool = "transformers" if part == "text_encoder" else "diffusers"
        by = "bitsandbytes' functions" if kind.startswith("bitsandbytes") else tool
        yield f"{kind.removeprefix('transformers ')}, by {by}", part, folder
    single: list[tuple[str, Callable[[Path], object]]] = [
        (f"quanto {kind}, by mmgp", partial(_by_mmgp, model, kind)) for kind in ("qint8", "qint4")
    ]
    single += [
        (f"{name}, by comfy-kitchen", partial(_by_kitchen, model, layout))
        for name, layout in KITCHEN.items()
    ]
    single += [
        (f"GGUF {kind}, by gguf", partial(_gguf, model, kind))
        for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")
    ]
    for what, each in single:
        yield f"{what}, in a ComfyUI root", "transformer", _comfy_root(model, scratch / what, each)


def opened(model: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """How far the weights and the latents of each folder are from the plain model's."""
    expected = latents(model)
    for what, part, folder in folders(model, scratch):
        found, plain = locate(folder).parts[part], locate(model).parts[part]
        with WeightReader(found) as ours, WeightReader(plain) as theirs:
            names = [
                name for name, shape in plain.shapes.items()
                if golden.is_block_matrix(name, torch.empty(shape, device="meta"))
            ]  # fmt: skip
            error = relative_rms(
                torch.cat([ours.read(name, torch.float32).flatten() for name in names]),
                torch.cat([theirs.read(name, torch.float32).flatten() for name in names]),
            )
        yield {
            "stored": what, "part": part, "weights": error,
            "latents": relative_rms(latents(folder), expected),
        }  # fmt: skip


def loras(scratch: Path) -> Iterator[dict[str, Any]]:
    """Twelve kinds on three formats, each used in three ways."""
    plain = write_tiny_model(
        scratch / "m", image_to_video=False, seed=2, vae={"base_dim": 8},
        transformer={"num_layers": 3},
    )  # fmt: skip
    for stored, name in test_kinds.BASES.items():
        folder = plain if name is None else scratch / stored
        if name is not None:
            pack(locate(plain), name, folder)
        without = test_kinds.without_lora(folder)
        for kind in kinds.KINDS:
            with tempfile.TemporaryDirectory() as made:
                found = test_kinds.differences(kind, folder, plain, without, Path(made))
            yield {"kind": kind, "stored": stored} | found


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="values,folders,loras")
    only = parser.parse_args().only.split(",")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in only}
    with tempfile.TemporaryDirectory() as folder, python_unpack():
        scratch = Path(folder)
        parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "values": lambda: (row for dtype in DTYPES for row in compared(dtype)),
            "folders": lambda: opened(
                golden.write_model(scratch / "plain", image_to_video=False), scratch / "folders"
            ),
            "loras": lambda: loras(scratch / "loras"),
        }
        for part in only:
            for row in parts[part]():
                found[part].append(row)
                print(row, flush=True)
    print(json.dumps({"torch": torch.__version__} | found))


if __name__ == "__main__":
    main()
