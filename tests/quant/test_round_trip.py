"""Every format that can be written: error, bytes, buffers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from penstock.engine.request.demo import MINI
from penstock.errors import CheckpointError, UsageError
from penstock.formats.formats import FORMATS, QuantFormat, get_format, writable
from penstock.formats.scaled import Scaled8
from penstock.formats.tags import ITEM_BYTES
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.policy import default_policy
from penstock.quant.values import scaled
from penstock.quant.values.tensors import DTYPES, dtype_tag
from tests.meter import StorageMeter
from tests.quant.calls import Calls
from tests.quant.weights import outlier_weight, relative_rms, small_weight, storage_bytes

WRITABLE = list(writable())
RAW_FP8 = Scaled8("fp8", "F8_E4M3", "fp8", scale="none")
TENSOR_INT8 = Scaled8("int8", "I8", "int8", scale="scalar")

# Relative RMS errors on Gaussian weights with rare outliers.
EXPECTED = {
    "raw fp8": (RAW_FP8, 0.033),
    "fp8": (get_format("fp8"), 0.0265),
    "int8": (get_format("int8"), 0.0099),
    "int8 per tensor": (TENSOR_INT8, 0.084),
    "gguf-q8_0": (get_format("gguf-q8_0"), 0.0054),
    "nf4": (get_format("nf4"), 0.092),
}


def shape_of(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def round_trip(fmt: QuantFormat, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantise(fmt, quantise(fmt, weight), shape_of(weight), dtype)


@pytest.fixture(scope="module")
def outliers() -> Tensor:
    return outlier_weight()


@pytest.mark.parametrize("label", EXPECTED)
def test_the_error_is_the_published_one(label: str, outliers: Tensor) -> None:
    fmt, expected = EXPECTED[label]
    assert relative_rms(round_trip(fmt, outliers), outliers) == pytest.approx(expected, rel=0.1)


def test_int8_per_row_beats_fp8_and_both_beat_their_coarser_forms(outliers: Tensor) -> None:
    int8, fp8, raw, whole = (
        relative_rms(round_trip(fmt, outliers), outliers)
        for fmt in (get_format("int8"), get_format("fp8"), RAW_FP8, TENSOR_INT8)
    )
    assert int8 < fp8 < raw < whole


@pytest.mark.parametrize("name", ["quanto-int8", "quanto-fp8"])
def test_quanto_storage_costs_no_accuracy(name: str, outliers: Tensor) -> None:
    ours = relative_rms(round_trip(get_format(name.removeprefix("quanto-")), outliers), outliers)
    assert relative_rms(round_trip(get_format(name), outliers), outliers) == pytest.approx(ours)


@pytest.mark.parametrize("compute", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", WRITABLE)
def test_storage_says_what_is_stored(name: str, compute: str) -> None:
    fmt = get_format(name)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[compute]
    weight = small_weight(48, 512, dtype)
    stored = quantise(fmt, weight)
    expected = fmt.storage((48, 512), compute)
    found = {suffix: (dtype_tag(t.dtype), tuple(t.shape)) for suffix, t in stored.items()}
    assert found == expected
    assert storage_bytes(expected) == sum(t.nbytes for t in stored.values())


def test_bytes_of_a_real_layer() -> None:
    shape = (5120, 13824)
    bits = {
        name: 8 * storage_bytes(fmt.storage(shape, "BF16")) / math.prod(shape)
        for name, fmt in FORMATS.items()
    }
    assert bits["gguf-q8_0"] == 8.5 and bits["gguf-q4_0"] == 4.5 and bits["nf4"] == 4.5
    assert bits["gguf-q6_k"] == 6.5625 and bits["gguf-q5_k"] == 5.5 and bits["gguf-q4_k"] == 4.5
    assert bits["quanto-int4"] == 4.25 and bits["bf16"] == 16
    assert 8 < bits["int8"] < 8.01 and 8 < bits["fp8"] < 8.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", WRITABLE)
def test_writing_into_a_buffer_equals_allocating(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    weight = small_weight(67, 256, torch.bfloat16)
    stored = quantise(fmt, weight)
    out = torch.full((67, 256), math.nan, dtype=dtype)
    returned = dequantise(fmt, stored, (67, 256), dtype, out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, dequantise(fmt, stored, (67, 256), dtype))


@pytest.mark.parametrize("name", ["bf16", "fp8", "int8", "nf4", "quanto-int4", "gguf-q8_0"])
def test_a_buffer_of_another_shape_or_dtype_is_refused(name: str) -> None:
    fmt = get_format(name)
    stored = quantise(fmt, small_weight())
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantise(fmt, stored, (48, 256), torch.float32, torch.empty(48, 255))
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantise(fmt, stored, (48, 256), torch.float32, torch.empty(48, 256).half())
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantise(fmt, stored, (48, 256), torch.float32, torch.empty(256, 48).t())


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_round_trip(name: str, dtype: torch.dtype) -> None:
    weight = small_weight(48, 512, dtype)
    limit = {"nf4": 0.11, "quanto-int4": 0.13}.get(name, 0.03)
    assert relative_rms(round_trip(get_format(name), weight, dtype), weight) < limit


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_zeros_stay_zeros(name: str, dtype: torch.dtype) -> None:
    weight = small_weight(16, 256, dtype)
    weight[3] = 0
    restored = round_trip(get_format(name), weight, dtype)
    assert torch.equal(restored[3], torch.zeros(256, dtype=dtype))
    assert bool(torch.isfinite(restored).all())


def test_constant_groups_of_quanto_int4_get_scale_1() -> None:
    weight = small_weight(4, 256)
    weight[2, 128:] = 0.25
    stored = quantise(get_format("quanto-int4"), weight)
    assert stored["weight._scale"].flatten()[5] == 1
    restored = dequantise(get_format("quanto-int4"), stored, (4, 256), torch.float32)
    assert torch.equal(restored[2, 128:], weight[2, 128:])


@pytest.mark.parametrize(("fmt", "whole"), [("int8", False), ("quanto-int8", False), (None, True)])
def test_the_largest_of_a_row_is_the_largest_code(fmt: str | None, whole: bool) -> None:
    """All of the 255 codes are used, and nothing is off by more than half of one."""
    weight = small_weight(48, 512)
    int8 = TENSOR_INT8 if fmt is None else get_format(fmt)
    stored = quantise(int8, weight)
    codes, scale = (stored[key] for key in (int8.weight_key, int8.scale_key))
    largest = weight.abs().amax() if whole else weight.abs().amax(1)
    assert torch.equal(scale.flatten(), (largest / 127).flatten())
    found = codes.abs().amax() if whole else codes.abs().amax(1)
    assert bool((found == 127).all())
    error = (round_trip(int8, weight) - weight).abs()
    assert bool((error <= 0.5001 * scale.reshape(-1, 1)).all())


@pytest.mark.parametrize("name", ["fp8", "quanto-fp8"])
def test_the_largest_of_a_row_is_the_largest_number_of_fp8(name: str) -> None:
    weight = small_weight(48, 512)
    fmt = get_format(name)
    stored = quantise(fmt, weight)
    assert bool((stored[fmt.weight_key].float().abs().amax(1) == 448).all())
    assert torch.equal(stored[fmt.scale_key].flatten(), weight.abs().amax(1) / 448)


@pytest.mark.parametrize("name", ["quanto-int8", "quanto-fp8"])
def test_a_scale_that_fp16_rounds_down_does_not_wrap_codes(name: str) -> None:
    weight = torch.linspace(-1e-5, 1e-5, 256).half().repeat(2, 1)
    restored = round_trip(get_format(name), weight)
    assert bool((restored.diff(dim=1) >= 0).all()) and restored[0, -1] > 5e-6


def test_a_raw_cast_saturates() -> None:
    weight = torch.tensor([[1000.0, -1000.0, 448.0]])
    assert round_trip(RAW_FP8, weight).tolist() == [[448.0, -448.0, 448.0]]


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_with_nan_or_inf_are_refused_by_name(name: str, bad: float) -> None:
    weight = small_weight()
    weight[7, 200] = bad
    with pytest.raises(CheckpointError, match=r"blocks\.3\.ffn.*row 7"):
        quantise(get_format(name), weight, "blocks.3.ffn.net.2.weight")


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, 2.0**-9, 0.37, 1e-38, 3e38])
def test_every_fp8_code_is_read_as_torch_reads_it(
    scale: float | None, dtype: torch.dtype, nan: bool
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes if nan else codes[codes.float().isfinite()]
    weight = codes.repeat(3, 1)
    fmt = Scaled8("fp8", "F8_E4M3", "fp8", "none" if scale is None else "column")
    stored, expected = {"weight": weight}, weight.float()
    if scale is not None:
        stored["weight_scale"] = torch.tensor([[scale], [-scale], [1.0]])
        expected = expected * stored["weight_scale"]
    found = dequantise(fmt, stored, shape_of(weight), dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert int(found.isnan().sum()) == (6 if nan else 0)
    found, expected = (each.nan_to_num(0.0, math.inf, -math.inf) for each in (found, expected))
    assert torch.equal(found.view(torch.uint8), expected.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_tag", ["BF16", "F16", "F32"])
def test_int8_is_rounded_once_whatever_the_dtypes(scale_tag: str, dtype: torch.dtype) -> None:
    fmt = Scaled8("int8", "I8", "int8", "column", scale_tag)
    weight = torch.arange(-127, 128, dtype=torch.int8).repeat(64, 1)
    scale = (torch.rand(64, 1) * 0.01).to(DTYPES[scale_tag])
    expected = (weight.double() * scale.double()).to(torch.float32).to(dtype)
    found = dequantise(fmt, {"weight": weight, "weight_scale": scale}, shape_of(weight), dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", ["none", "scalar", "column"])
def test_e5m2_is_decoded_as_torch_does(scale: Any, dtype: torch.dtype) -> None:
    fmt = Scaled8("fp8-e5m2", "F8_E5M2", None, scale)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).repeat(64, 4)
    scales = torch.rand(64, 1) if scale == "column" else torch.tensor(0.37)
    stored = {"weight": every, "weight_scale": scales}
    expected = every.float() * (1 if scale == "none" else scales)
    found = dequantise(fmt, stored, shape_of(every), dtype)
    assert torch.equal(found.nan_to_num(), expected.to(dtype).nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "quanto-int8", "fp8", "quanto-fp8"])
def test_a_device_decodes_at_once_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, Scaled8)
    stored = quantise(fmt, small_weight(dtype=torch.bfloat16))
    found = scaled._at_once(*scaled.operands(fmt, stored), torch.empty(48, 256, dtype=dtype))
    assert torch.equal(found, dequantise(fmt, stored, (48, 256), dtype))


def test_int8_is_decoded_on_a_device_in_one_pass() -> None:
    weight = torch.empty(48, 256, dtype=torch.int8, device="meta")
    stored = {"weight": weight, "weight_scale": torch.empty(48, 1, device="meta")}
    out = torch.empty(48, 256, dtype=torch.bfloat16, device="meta")
    with Calls() as calls:
        assert dequantise(get_format("int8"), stored, (48, 256), torch.bfloat16, out) is out
    assert calls.names == ["mul.out"]


def test_a_value_too_large_for_fp16_is_refused() -> None:
    weight = small_weight()
    weight[0, 0] = 70000.0
    with pytest.raises(CheckpointError, match="fp16"):
        quantise(get_format("fp16"), weight)
    assert torch.equal(round_trip(get_format("fp32"), weight), weight)


@pytest.mark.parametrize("name", ["nf4", "gguf-q8_0"])
def test_rows_that_are_not_whole_blocks_are_refused(name: str) -> None:
    fmt = get_format(name)
    assert not fmt.fits((48, 250))
    with pytest.raises(ValueError, match="not whole blocks"):
        quantise(fmt, small_weight(48, 250))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in WRITABLE])
def test_formats_that_are_only_read_say_so(name: str) -> None:
    with pytest.raises(UsageError, match="read, not written"):
        quantise(get_format(name), small_weight())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_allocates_no_more_than_it_says(
    name: str, dtype: torch.dtype, device: str
) -> None:
    fmt, shape = get_format(name), (700, 1024) if device == "cpu" else (5120, 13824)
    stored = {
        suffix: torch.zeros(dims, dtype=DTYPES[tag], device=device)
        for suffix, (tag, dims) in fmt.storage(shape, "BF16").items()
    }
    out = torch.empty(shape, dtype=dtype, device=device)
    dequantise(fmt, stored, shape, dtype, out)
    with StorageMeter(exclude=[out, *stored.values()]) as meter:
        dequantise(fmt, stored, shape, dtype, out)
    assert meter.peak <= fmt.workspace_bytes(shape, device) <= 2 * out.nbytes


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="quanto-int4"):
        get_format("int3")


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["int8"]  # type: ignore[index]
    assert all(name == fmt.name for name, fmt in FORMATS.items())


def test_tags_and_their_bytes_agree_with_torch() -> None:
    assert {tag: dtype.itemsize for tag, dtype in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize(
    "columns, size", [(5120, 256), (13824, 256), (768, 256), (192, 64), (48, 16), (50, 256)]
)
def test_a_rotation_is_as_wide_as_the_rows_have_it_whole(columns: int, size: int) -> None:
    fmt = get_format("int8-convrot")
    assert isinstance(fmt, Scaled8)
    assert fmt.suited((8, columns)).rotation == size
    assert fmt.suited((8, columns)).fits((8, columns)) == (columns != 50)
    plain = get_format("int8")
    assert isinstance(plain, Scaled8) and plain.suited((8, columns)) is plain


def test_rotated_weights_of_the_trained_model_err_less() -> None:
    weights = load_file(MINI / "transformer" / "diffusion_pytorch_model.safetensors")
    names = default_policy({name: tuple(w.shape) for name, w in weights.items()})
    errors = {}
    for name in ("int8", "int8-convrot"):
        fmt = get_format(name)
        assert isinstance(fmt, Scaled8)
        difference = total = 0.0
        for weight in (weights[each] for each in names):
            found = round_trip(fmt.suited(shape_of(weight)), weight)
            difference += float((found - weight.float()).double().square().sum())
            total += float(weight.double().square().sum())
        errors[name] = (difference / total) ** 0.5
    assert errors["int8-convrot"] < 0.95 * errors["int8"] < 0.0076
