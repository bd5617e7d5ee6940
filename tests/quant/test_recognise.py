"""From a file's tensors to a format: every spelling, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.errors import CheckpointError
from penstock.formats.formats import get_format
from penstock.formats.recognise import canonical_suffix, recognise
from penstock.formats.scaled import Scaled8
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.values.tensors import dtype_tag
from tests.quant.weights import relative_rms, small_weight


def specs(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {suffix: (dtype_tag(t.dtype), tuple(t.shape)) for suffix, t in tensors.items()}


def reads(tensors: dict[str, Tensor], weight: Tensor, **options: object) -> float:
    """Relative error of the weight that `recognise` and the format make of a file's tensors."""
    fmt = recognise(specs(tensors), **options)  # type: ignore[arg-type]
    named = {name: t for s, t in tensors.items() if (name := canonical_suffix(s)) is not None}
    shape = (weight.shape[0], weight.shape[1])
    assert set(fmt.storage(shape, "F32")) <= set(named)
    return relative_rms(dequantise(fmt, named, shape, torch.float32), weight)


FP8 = torch.float8_e4m3fn


def scaled_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(FP8), scale


def test_raw_fp8_without_a_scale() -> None:
    weight = small_weight()
    assert reads({"weight": weight.to(FP8)}, weight) < 0.04


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dims", [(), (1,), (1, 1)])
def test_comfy_scaled_fp8_in_both_spellings(suffix: str, dims: tuple[int, ...]) -> None:
    weight = small_weight()
    stored, scale = scaled_fp8(weight)
    ignored = {"scale_input": torch.ones(()), "comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    assert reads({"weight": stored, suffix: scale.reshape(dims), **ignored}, weight) < 0.03


@pytest.mark.parametrize("dims", [(48,), (48, 1)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_int8_with_a_scale_for_each_row(dims: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    weight = small_weight() * torch.logspace(-2, 0, 48)[:, None]
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(scale_dtype)
    stored = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    assert reads({"weight": stored, "weight_scale": scale.reshape(dims)}, weight) < 0.012


def test_comfy_int8_tensorwise_with_one_scale() -> None:
    weight = small_weight()
    scale = weight.abs().max().reshape(1) / 127
    stored = {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}
    assert reads(stored, weight, comfy={"format": "int8_tensorwise"}) < 0.02


@pytest.mark.parametrize(
    "name", ["bf16", "fp16", "fp32", "fp8", "int8", "quanto-int8", "quanto-int4"]
)
def test_our_own_storage_is_recognised(name: str) -> None:
    stored = quantise(get_format(name), small_weight(48, 256, torch.bfloat16))
    assert recognise(specs(stored)).name == name
    assert recognise(specs(stored) | {"bias": ("BF16", (48,))}).name == name


def test_a_file_that_forbids_8_bit_products_is_obeyed() -> None:
    stored = {"weight": ("F8_E4M3", (48, 256)), "weight_scale": ("F32", ())}
    full = recognise(stored, full_precision=True)
    marked = recognise(
        stored, comfy={"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    )
    free = recognise(stored)
    assert isinstance(full, Scaled8) and isinstance(marked, Scaled8) and isinstance(free, Scaled8)
    assert full.gemm is None and marked.gemm is None and free.gemm == "fp8"


@pytest.mark.parametrize("size, dims", [(256, (48, 1)), (64, (48,)), (16, ())])
def test_convrot_is_read(size: int, dims: tuple[int, ...]) -> None:
    stored = {"weight": ("I8", (48, 256)), "weight_scale": ("F32", dims)}
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    found = recognise(stored, layer="blocks.0.x", comfy=config)
    assert isinstance(found, Scaled8)
    assert (found.name, found.rotation, found.gemm) == ("int8-convrot", size, "int8")
    assert found.storage((48, 256), "BF16") == stored


@pytest.mark.parametrize("size", [32, 0, "256", 1024])
def test_other_rotations_are_refused_with_a_remedy(size: object) -> None:
    stored = {"weight": ("I8", (48, 256)), "weight_scale": ("F32", (48, 1))}
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.x was rotated.*Use the same model"):
        recognise(stored, layer="blocks.0.x", comfy=config)


@pytest.mark.parametrize("kind", ["int8_blockwise", "int4_awq", "svdquant_w4a4"])
def test_other_comfy_formats_are_refused_by_name(kind: str) -> None:
    stored = {"weight": ("I8", (256, 256)), "weight_scale": ("F32", (2, 2))}
    with pytest.raises(CheckpointError, match=kind):
        recognise(stored, comfy={"format": kind})


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"weight": ("I8", (48, 256))},
        {"weight": ("F8_E8M0", (48, 256))},
        {"weight": ("U8", (48, 128))},
        {"weight": ("BF16", (48, 256)), "weight_scale": ("F32", ())},
        {"weight._data": ("I8", (48, 256))},
        {"weight": ("I8", (48, 256)), "weight_scale": ("F32", ()), "weight_scale_2": ("F32", ())},
    ],
)
def test_unknown_tensors_are_refused(stored: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with pytest.raises(CheckpointError, match="blocks.5.y"):
        recognise(stored, layer="blocks.5.y")


def test_a_scale_by_blocks_is_refused() -> None:
    stored = {"weight": ("F8_E4M3", (256, 256)), "weight_scale": ("F32", (2, 2))}
    with pytest.raises(CheckpointError, match="unknown layout"):
        recognise(stored)


def test_both_spellings_of_a_scale_at_once_are_refused() -> None:
    stored = {
        "weight": ("F8_E4M3", (48, 256)),
        "weight_scale": ("F32", ()),
        "scale_weight": ("F32", ()),
    }
    with pytest.raises(CheckpointError, match="two names"):
        recognise(stored)


def test_bitsandbytes_8_bits_are_named() -> None:
    stored = {"weight": ("I8", (48, 256)), "SCB": ("F32", (48,))}
    with pytest.raises(CheckpointError, match="blocks.5.y is stored in bitsandbytes' 8 bits"):
        recognise(stored, layer="blocks.5.y")
