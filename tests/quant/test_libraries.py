"""Against the projects whose storage we read: the same values, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.dequantise import SCALES
from penstock.formats.formats import FORMATS, get_format
from penstock.formats.gguf import GGUF_FORMATS, Gguf
from penstock.formats.quanto import group_size
from penstock.formats.recognise import canonical_suffix, recognise
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.compute import Int8Gemm, Operands
from penstock.quant.values import nf4
from penstock.quant.values.nf4 import compiled_kernel
from penstock.quant.values.tensors import dtype_tag
from tests.meter import StorageMeter
from tests.quant.weights import relative_rms, small_weight
from tests.quanto_python import python_unpack
from tests.versions import BITSANDBYTES_0_48

COMPILED = pytest.mark.skipif(BITSANDBYTES_0_48, reason="its compiled function is not known")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 256), (700, 2048), (3, 64)])
def test_nf4_equals_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = small_weight(*shape, dtype)
    weight[1] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = quantise(get_format("nf4"), weight)
    assert torch.equal(stored["weight"].flatten(), packed.flatten())
    assert torch.equal(stored["weight_absmax"].flatten(), state.absmax)
    ours = dequantise(get_format("nf4"), stored, shape, dtype)
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_by_the_operator_and_by_the_compiled_function(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, shape = get_format("nf4"), (700, 2048)
    stored = quantise(fmt, small_weight(*shape, dtype))
    assert compiled_kernel(dtype) is not None
    compiled = dequantise(fmt, stored, shape, dtype)
    monkeypatch.setattr(nf4, "compiled_kernel", lambda dtype: None)
    with StorageMeter(exclude=stored.values()) as meter:
        operator = dequantise(fmt, stored, shape, dtype)
    assert meter.peak > operator.nbytes  # it was the operator, with its new tensors
    assert torch.equal(compiled, operator)


def test_nf4_calls_no_compiled_function_of_unknown_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes, "__version__", "0.51.0")
    assert compiled_kernel(torch.float32) is None


def test_nf4_does_without_a_library_that_did_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = pytest.importorskip("bitsandbytes.cextension")
    monkeypatch.setattr(extension, "lib", extension.ErrorHandlerMockBNBNativeLibrary("no library"))
    assert compiled_kernel(torch.float32) is None


@COMPILED
@pytest.mark.parametrize("key", ["weight", "weight_absmax"])
@pytest.mark.parametrize("change", ["shorter", "strided", "other dtype"])
def test_nf4_gives_the_compiled_function_no_memory_of_another_shape(key: str, change: str) -> None:
    fmt, shape = get_format("nf4"), (48, 256)
    stored = quantise(fmt, small_weight(*shape))
    tensor = stored[key]
    wrong = {
        "shorter": tensor[:-1],
        "strided": torch.cat([tensor, tensor], 1)[:, ::2],
        "other dtype": tensor.to(torch.float64),
    }
    with pytest.raises(ValueError, match=f"{key} must be contiguous"):
        dequantise(fmt, stored | {key: wrong[change]}, shape, torch.float32)


def random_blocks(fmt: Gguf, rows: int, columns: int) -> Tensor:
    """Random bytes whose fp16 fields are finite and small; every code and scale occurs."""
    generator = torch.Generator().manual_seed(fmt.block_bytes)
    size = (rows, columns // fmt.block, fmt.block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    for start in SCALES.get(fmt.ggml_type, (0,)):
        half = (torch.randn(*size[:2], 1, generator=generator) * 0.01).half()
        blocks[:, :, start : start + 2] = half.view(torch.uint8)
    if fmt.ggml_type == "IQ1_M":  # the scale's four nibbles top the last four 16-bit numbers
        blocks[:, :, [49, 51, 53, 55]] &= 15
        blocks[:, :, 55] |= 0x20
    return blocks.view(rows, -1)


@pytest.mark.parametrize("fmt", GGUF_FORMATS, ids=lambda fmt: fmt.name)
def test_gguf_blocks_equal_the_gguf_package(fmt: Gguf) -> None:
    kind = GGMLQuantizationType[fmt.ggml_type]
    assert (fmt.block, fmt.block_bytes) == GGML_QUANT_SIZES[kind]
    stored = random_blocks(fmt, 300, 1024)
    assert fmt.storage((300, 1024), "BF16") == {"weight": ("U8", tuple(stored.shape))}
    expected = torch.from_numpy(gguf_dequantize(stored.numpy(), kind))
    found = dequantise(fmt, {"weight": stored}, (300, 1024), torch.float32)
    assert torch.equal(found, expected)
    half = dequantise(fmt, {"weight": stored}, (300, 1024), torch.bfloat16)
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.parametrize(
    "name", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "MXFP4", "TQ1_0", "TQ2_0"]
)
def test_gguf_weights_written_by_the_gguf_package_read_back(name: str) -> None:
    kind = GGMLQuantizationType[name]
    weight = small_weight(64, 1024)
    stored = torch.from_numpy(gguf_quantize(weight.numpy(), kind))
    fmt = get_format(f"gguf-{name.lower()}")
    found = dequantise(fmt, {"weight": stored}, (64, 1024), torch.float32)
    limits = {"Q8_0": 0.006, "Q5_0": 0.05, "Q5_1": 0.05, "MXFP4": 0.15, "TQ1_0": 0.9, "TQ2_0": 0.9}
    limit = limits.get(name, 0.1)
    assert relative_rms(found, weight) < limit


def test_q8_0_is_written_as_the_gguf_package_writes_it() -> None:
    weight = small_weight(96, 2048)
    weight[5] = 0
    weight[6, :32] = torch.arange(32) + 0.5  # halves, at a scale of exactly 1
    weight[7, :32] = -weight[6, :32]
    weight[6:8, 0] = 127.0
    expected = gguf_quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantise(get_format("gguf-q8_0"), weight)["weight"].numpy(), expected)


@pytest.fixture
def quanto() -> Iterator[Any]:
    """optimum-quanto, unpacking with its Python code."""
    with python_unpack():
        yield pytest.importorskip("optimum.quanto")


def quanto_values(quanto: Any, kind: str, layer: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """The weight as quanto reads it from a file's tensors, without its packing for CPU kernels."""
    shape, missing = layer.weight.shape, []
    names = {key.removeprefix("weight."): value for key, value in tensors.items()}
    if kind == "qint4":
        weight = quanto.WeightQBitsTensor.load_from_state_dict(
            names, "", quanto.qint4, 0, layer.weight_group_size, shape, (shape[1], 1), missing
        )
    else:
        weight = quanto.WeightQBytesTensor.load_from_state_dict(
            names, "", getattr(quanto, kind), 0, shape, (shape[1], 1), None, missing
        )
    assert not missing
    return weight.dequantize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(33, 96), (48, 160), (48, 256), (33, 130)])
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4"])
def test_quanto_files_open(
    quanto: Any, kind: str, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).to(dtype)
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tensors = {
        suffix: tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
        if (suffix := canonical_suffix(key.removeprefix("0."))) not in (None, "bias")
    }
    fmt = recognise({k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in tensors.items()})
    names = {"qint8": "quanto-int8", "qfloat8": "quanto-fp8", "qint4": "quanto-int4"}
    assert fmt.name == names[kind]
    found = {suffix: (dtype_tag(t.dtype), tuple(t.shape)) for suffix, t in tensors.items()}
    assert found == fmt.storage(shape, dtype_tag(dtype))
    expected = quanto_values(quanto, kind, model[0], tensors)
    assert torch.equal(dequantise(fmt, tensors, shape, dtype), expected)


@pytest.mark.parametrize("name", ["quanto-int8", "quanto-fp8", "quanto-int4"])
def test_quanto_opens_what_we_write(quanto: Any, name: str) -> None:
    weight = small_weight(32, 256, torch.bfloat16)
    fmt = get_format(name)
    stored = quantise(fmt, weight)
    kind = {"quanto-int8": "qint8", "quanto-fp8": "qfloat8", "quanto-int4": "qint4"}[name]
    layer = quanto.QLinear(256, 32, dtype=torch.bfloat16, weights=getattr(quanto, kind))
    expected = quanto_values(quanto, kind, layer, stored)
    assert relative_rms(expected, weight) < {"qint4": 0.13}.get(kind, 0.03)
    assert torch.equal(dequantise(fmt, stored, (32, 256), torch.bfloat16), expected)


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 192, 224, 256, 300, 5120, 13824])
def test_groups_are_those_that_quanto_chooses(quanto: Any, columns: int) -> None:
    layer = quanto.QLinear(columns, 4, weights=quanto.qint4, device="meta")
    assert group_size(columns) == layer.weight_group_size


def _kitchen() -> Any:
    return pytest.importorskip("comfy_kitchen.tensor")


@pytest.mark.parametrize("size", [16, 64, 256])
def test_convrot_as_comfy_kitchen_has_it(size: int) -> None:
    layout, weight = _kitchen().TensorWiseINT8Layout, small_weight(96, 1024)
    weight[:, ::97] *= 20
    codes, params = layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=size)
    stored = {"weight": codes, "weight_scale": params.scale.reshape(96, 1)}
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    fmt = recognise({k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in stored.items()},
                    comfy=config)  # fmt: skip
    theirs = layout.dequantize(codes, params)
    ours = dequantise(fmt, stored, (96, 1024), torch.float32)
    # Theirs sums scaled products in fp32; ours sums whole numbers, so it is rounded once.
    assert (ours - theirs).abs().max() <= 2e-7 * theirs.abs().max() * size**0.5
    turn = import_module("comfy_kitchen.tensor.int8_utils")._build_hadamard(
        size, dtype=torch.float64
    )
    scaled = codes.double() * params.scale.double()
    exact = (scaled.view(96, -1, size) @ turn).view(96, 1024)
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()
    # And quantised as they do, but for codes that fp32 sums round to the other side.
    made = quantise(fmt, weight)
    assert (made["weight"].int() - codes.int()).abs().max() <= 1
    assert (made["weight"] != codes).float().mean() < 1e-3
    torch.testing.assert_close(made["weight_scale"], stored["weight_scale"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_rotation_is_undone_on_the_fast_path(size: int) -> None:
    fmt = replace(FORMATS["int8-convrot"], rotation=size)  # type: ignore[type-var]
    weight, x = small_weight(64, 1024), torch.randn(33, 1024)
    stored = quantise(fmt, weight)
    found = Int8Gemm()(Operands(fmt, (64, 1024), stored, None), x)
    wanted = x @ dequantise(fmt, stored, (64, 1024), torch.float32).t()
    assert relative_rms(found, wanted) < 0.012
    x[:, 5] *= 30  # an outlier, which the rotation spreads
    found = Int8Gemm()(Operands(fmt, (64, 1024), stored, None), x)
    plain = get_format("int8")
    unturned = Int8Gemm()(Operands(plain, (64, 1024), quantise(plain, weight), None), x)
    assert relative_rms(found, x @ weight.t()) < relative_rms(unturned, x @ weight.t())


@pytest.mark.parametrize("shape", [(96, 1024), (40, 72), (300, 512)])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_blackwells_formats_as_comfy_kitchen_has_them(name: str, shape: tuple[int, int]) -> None:
    layouts = {"nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout"}
    layout, weight = getattr(_kitchen(), layouts[name]), small_weight(*shape)
    weight[3] = 0
    weight[:, 7] *= 40
    codes, params = layout.quantize(weight)
    stored = {"weight" + k: v for k, v in layout.state_dict_tensors(codes, params).items()}
    found = {k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in stored.items()}
    fmt = recognise(found, comfy={"format": name})
    assert fmt.name == name and fmt.storage(shape, "BF16") == found
    theirs = layout.dequantize(codes, params)[: shape[0], : shape[1]]
    assert torch.equal(dequantise(fmt, stored, shape, torch.float32), theirs)
    # In bf16 theirs rounds the scales first; ours rounds the fp32 product once.
    assert torch.equal(dequantise(fmt, stored, shape, torch.bfloat16), theirs.bfloat16())
    assert relative_rms(theirs, weight) < 0.2
    if name == "mxfp8":  # ComfyUI's files may call the powers bytes
        stored["weight_scale"] = stored["weight_scale"].view(torch.uint8)
        fmt = recognise(found | {"weight_scale": ("U8", found["weight_scale"][1])})
        assert torch.equal(dequantise(fmt, stored, shape, torch.float32), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights_open(kind: str, dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(256, 48, bias=False)).to(dtype)
    torchao.quantize_(layer, getattr(torchao, kind)())
    theirs = layer[0].weight
    stored = {"weight": theirs.qdata, "weight_scale": theirs.scale}
    spelled = {"_weight_qdata": theirs.qdata, "_weight_scale": theirs.scale}
    if hasattr(theirs, "zero_point"):
        spelled["_weight_zero_point"] = theirs.zero_point
    fmt = recognise({k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in spelled.items()})
    assert fmt.name == ("int8" if "Int8" in kind else "fp8")
    found = dequantise(fmt, stored, (48, 256), torch.float32)
    # Theirs gives the product in the model's dtype; in bf16 they round it on the way.
    tolerance = 0.0 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, theirs.dequantize().float(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 256), (700, 1024)])
def test_bitsandbytes_own_tensors_open(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(
        small_weight(*shape, dtype), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    held = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    said = json.loads(bytes(held["weight.quant_state.bitsandbytes__nf4"].tolist()))
    fmt = recognise({k: (dtype_tag(t.dtype), tuple(t.shape)) for k, t in held.items()}, state=said)
    assert fmt.name == "nf4" and fmt.label == ("nf4 nested" if nested else "nf4")
    stored = {s: t for k, t in held.items() if (s := canonical_suffix(k)) is not None}
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantise(fmt, stored, shape, dtype), expected)
    out = torch.empty(shape, dtype=dtype)
    with StorageMeter(exclude=[out, *stored.values()]) as meter:
        dequantise(fmt, stored, shape, dtype, out)
    assert meter.peak <= fmt.workspace_bytes(shape, "cpu")
