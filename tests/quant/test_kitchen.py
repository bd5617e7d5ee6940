"""int8 products by comfy-kitchen: through its slow twin on the CPU, against a reference of ours."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import comfy_kitchen
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine import variants
from penstock.formats.formats import get_format
from penstock.formats.scaled import Scaled8
from penstock.quant import probe
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.compute import Int8Gemm, KitchenInt8, Operands, quantise_tokens, strategy_for
from penstock.quant.paths import KITCHEN_BYTES, Computing, Scratch
from penstock.quant.probe import PathReport, probe_kitchen, try_path

SHAPE = (48, 256)
CPU = torch.device("cpu")
WORKS = PathReport(True, 0.9999, "")


def operands(fmt: Scaled8, *, bias: bool = True) -> tuple[Operands, Tensor]:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(SHAPE, generator=draw) * torch.logspace(-2, 0, SHAPE[0])[:, None]
    x = torch.randn(2, 21, SHAPE[1], generator=draw)
    added = torch.randn(SHAPE[0], generator=draw) if bias else None
    return Operands(fmt, SHAPE, quantise(fmt, weight), added), x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", ["column", "row", "scalar"])
def test_the_bits_are_those_of_exact_sums_scaled_once(scale: Any, bias: bool) -> None:
    fmt = Scaled8("int8", "I8", "int8", scale=scale)
    linear, x = operands(fmt, bias=bias)
    codes, token_scale = quantise_tokens(x.flatten(0, 1), torch.int8)
    sums = codes.long() @ linear.tensors["weight"].long().t()
    rows = linear.tensors["weight_scale"].reshape(1, -1)
    expected = sums.float() * (token_scale * rows)
    if linear.bias is not None:
        expected = expected + linear.bias
    assert torch.equal(KitchenInt8()(linear, x), expected.view(2, 21, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int8-convrot"])
def test_products_are_near_the_decoded_ones_whatever_the_chunks(
    name: str, dtype: torch.dtype
) -> None:
    linear, x = operands(get_format(name))
    x = x.to(dtype)
    found = KitchenInt8()(linear, x)
    assert found.dtype == dtype
    chunked = KitchenInt8(chunk_bytes=10_000)(linear, x)
    if name == "int8":
        assert torch.equal(chunked, found)
    else:  # its slow twin turns tokens by a matrix product, which rounds by their number
        assert F.cosine_similarity(chunked.float(), found.float(), dim=-1).min() > 0.9999
    weight = dequantise(linear.format, linear.tensors, SHAPE, torch.float32)
    reference = F.linear(x.float(), weight, linear.bias)
    assert F.cosine_similarity(found.float(), reference, dim=-1).min() > 0.9995


def test_the_trial_passes_with_the_right_kernel_and_finds_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = comfy_kitchen.int8_linear
    assert try_path("int8", KitchenInt8(), CPU, torch.bfloat16).works

    def one_scale(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, **more: Any) -> Tensor:
        return honest(x, weight, scale.mean(), bias, **more)

    def refuses(*given: object, **more: object) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    for kernel, reason in ((one_scale, "times as large"), (refuses, "no kernel image")):
        monkeypatch.setattr(comfy_kitchen, "int8_linear", kernel)
        report = try_path("int8", KitchenInt8(), CPU, torch.bfloat16)
        assert not report.works and reason in report.reason and "\n" not in report.reason
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert "extra 'fast'" in try_path("int8", KitchenInt8(), CPU, torch.bfloat16).reason


def test_without_a_card_its_slow_twin_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_kitchen("cpu") == PathReport(False, None, "it needs a CUDA device")
    tried: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(probe, "try_path", lambda *given: tried.append(given) or WORKS)
    assert probe_kitchen("cuda").works
    assert tried == [("int8", KitchenInt8(), torch.device("cuda"), torch.bfloat16)]


def test_it_serves_int8_where_it_works_and_its_bytes_are_counted() -> None:
    int8 = get_format("int8")
    own, kitchens = (
        Computing(Scratch(0, "cuda"), "fast", frozenset(works), 10_000)
        for works in (("int8",), ("int8", "int8-kitchen"))
    )
    assert strategy_for(own, int8, SHAPE) == Int8Gemm(10_000)
    assert strategy_for(kitchens, int8, SHAPE) == KitchenInt8(10_000)
    assert kitchens.path_for(get_format("fp8"), SHAPE) == "dequant"
    assert strategy_for(kitchens, int8, (47, 256)).path == "dequant"
    least = 33 * (256 + 8 + 4 * 48 + 4 * 256) + 8 * 48 + 4
    assert kitchens.workspace_bytes(int8, SHAPE) == KITCHEN_BYTES + least
    alone = Computing(Scratch(0, "cuda"), "fast", frozenset({"int8-kitchen"}))
    assert alone.path_for(int8, SHAPE) == "dequant"


def test_the_trial_decides_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PathReport(False, None, "cosine 0.5")
    monkeypatch.setattr(probe, "probe", lambda device: dict.fromkeys(
        ("fp8", "fp8-rowwise", "int8"), WORKS
    ))  # fmt: skip
    for report, told in ((WORKS, "they work here"), (refused, "not here (cosine 0.5)")):
        monkeypatch.setattr(probe, "probe_kitchen", lambda device, report=report: report)
        computing, notices = variants.computing_on("cuda:0", "fast")
        assert ("int8-kitchen" in computing.working) == report.works
        assert notices[-1] == f"int8 products by comfy-kitchen: {told}"
    monkeypatch.setattr(probe, "probe_kitchen", None)
    assert "int8-kitchen" not in variants.computing_on("cpu", "fast")[0].working


def test_a_fingerprint_knows_whose_products_they_are() -> None:
    kitchens = frozenset({"int8", "int8-kitchen"})
    found = variants.kitchen_numerics("int8", kitchens)
    assert found == {"int8": f"comfy-kitchen {version('comfy-kitchen')}"}
    assert variants.kitchen_numerics("dequant", kitchens) == {}
    assert variants.kitchen_numerics("int8", frozenset({"int8"})) == {}
