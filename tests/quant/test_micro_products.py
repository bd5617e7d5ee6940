"""Products in NVFP4 and MXFP8 by comfy-kitchen: what it makes of tokens, its trial, who is told.

A CPU has no such product: a stand-in decodes both operands by penstock's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy_kitchen
import pytest
import torch
from torch import Tensor

from penstock.engine.variants import _told_blocks, kitchen_numerics
from penstock.formats.formats import get_format
from penstock.formats.scaled import Gemm
from penstock.profiles.manifest import Storage
from penstock.profiles.phases import compute_path
from penstock.profiles.policy import Policy
from penstock.profiles.rates import Rates
from penstock.quant.arithmetic import dequantise
from penstock.quant.compute import Dequant, KitchenMicro, Operands, strategy_for
from penstock.quant.paths import KITCHEN_BYTES, Computing, Scratch
from penstock.quant.probe import PathReport, in_blocks, probe_micro, try_path

CPU = torch.device("cpu")
NAMES: list[Gemm] = ["nvfp4", "mxfp8"]


def decoded(name: str, codes: Tensor, scales: Tensor, whole: Tensor | None) -> Tensor:
    fmt, columns = get_format(name), codes.shape[1] * (2 if name == "nvfp4" else 1)
    stored = {"weight": codes, "weight_scale": scales}
    stored |= {} if whole is None else {"weight_scale_2": whole}
    return dequantise(fmt, stored, (len(codes), columns), torch.float32)


def nvfp4(
    a: Tensor, b: Tensor, whole_a: Tensor, whole_b: Tensor, a_scale: Tensor, b_scale: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    found = decoded("nvfp4", a, a_scale, whole_a) @ decoded("nvfp4", b, b_scale, whole_b).T
    return (found if bias is None else found + bias.float()).to(dtype)


def mxfp8(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    found = decoded("mxfp8", a, a_scale, None) @ decoded("mxfp8", b, b_scale, None).T
    return (found if bias is None else found + bias.float()).to(dtype)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_nvfp4", nvfp4)
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_mxfp8", mxfp8)


def tokens(rows: int, columns: int = 256) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=draw).to(torch.bfloat16)


def linear(name: Gemm, bias: Tensor | None = None) -> Operands:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(4))
    return Operands(get_format(name), (96, 256), in_blocks(name, weight), bias)


@pytest.mark.parametrize("name", NAMES)
def test_the_library_makes_what_our_arithmetic_reads(name: Gemm) -> None:
    stored = linear(name).tensors
    if name == "nvfp4":
        theirs = comfy_kitchen.dequantize_nvfp4(
            stored["weight"], stored["weight_scale_2"], stored["weight_scale"], torch.float32
        )
    else:
        theirs = comfy_kitchen.dequantize_mxfp8(
            stored["weight"], stored["weight_scale"], torch.float32
        )
    ours = dequantise(get_format(name), stored, (96, 256), torch.float32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 40, 64])
def test_a_linear_is_the_product_of_what_was_made(
    name: Gemm, rows: int, standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = torch.linspace(-1, 1, 96).to(torch.bfloat16)
    given, of = tokens(rows), linear(name, bias)
    weight = dequantise(of.format, of.tensors, of.shape, torch.float32)
    found = KitchenMicro(name)(of, given.view(1, rows, 256))
    assert found.shape == (1, rows, 96) and found.dtype == torch.bfloat16
    exact = given.float() @ weight.T + bias.float()
    error = (found[0].float() - exact).norm() / exact.norm()
    assert error < {"nvfp4": 0.12, "mxfp8": 0.04}[name]
    if name == "mxfp8":  # its blocks know nothing of other tokens
        parts = KitchenMicro(name, chunk_bytes=20_000)(of, given.view(1, rows, 256))
        assert torch.equal(parts, found)


@pytest.mark.parametrize("name", NAMES)
def test_the_trial_knows_right_from_wrong(
    name: Gemm, standing_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = try_path(name, KitchenMicro(name), CPU, torch.bfloat16)
    assert report.works and report.cosine is not None
    assert report.cosine > {"nvfp4": 0.98, "mxfp8": 0.998}[name]
    right: Callable[..., Tensor] = {"nvfp4": nvfp4, "mxfp8": mxfp8}[name]

    def unscaled(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        scales = list(rest)
        at = 3 if name == "nvfp4" else 1
        scales[at] = torch.full_like(scales[at].view(torch.uint8), 0x38).view(scales[at].dtype)
        return right(a, b, *scales)

    def shifted(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        return right(a, b.roll(1, dims=1), *rest)

    for wrong in (unscaled, shifted):
        monkeypatch.setattr(comfy_kitchen, f"scaled_mm_{name}", wrong)
        assert not try_path(name, KitchenMicro(name), CPU, torch.bfloat16).works


def test_the_trial_fails_here_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, report in probe_micro(CPU).items():
        assert report == PathReport(False, None, "it needs a CUDA device")
        tried = try_path(name, KitchenMicro(name), CPU, torch.bfloat16)
        assert not tried.works and "CPU" in tried.reason  # torch itself refuses
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reports = probe_micro("cuda")
    assert all("sm90 has no such tensor cores" in each.reason for each in reports.values())
    assert _told_blocks(reports).count("sm100 or newer is needed") == 2
    works = {"nvfp4": PathReport(True, 0.99, ""), "mxfp8": reports["mxfp8"]}
    told = _told_blocks(works)
    assert "nvfp4 work here; not mxfp8 (sm90" in told


@pytest.mark.parametrize("name", NAMES)
def test_it_is_taken_where_it_works_and_the_shape_allows(name: Gemm) -> None:
    fmt, scratch = get_format(name), Scratch(0, "cuda")
    fast = Computing(scratch, "fast", frozenset({name}), 10_000)
    assert strategy_for(fast, fmt, (96, 256)) == KitchenMicro(name, 10_000)
    assert fast.workspace_bytes(fmt, (96, 256)) > KITCHEN_BYTES
    for computing, shape in (
        (fast, (96, 250)),
        (Computing(scratch, "exact", frozenset({name})), (96, 256)),
        (Computing(scratch, "fast", frozenset({"int8", "int8-kitchen"})), (96, 256)),
    ):
        assert strategy_for(computing, fmt, shape) == Dequant(scratch)
    assert fast.path_for(get_format("mxfp8"), (96, 272)) == "dequant"  # no multiple of 32
    assert "comfy-kitchen" in kitchen_numerics(name, frozenset({name}))[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_on_it_where_a_rate_was_measured(name: Gemm) -> None:
    rates = Rates(1e12, 1e10, 1e9, **{f"{name}_flops": 4e12})
    stored, fast = Storage(name, 1000, 0, 1000), Policy(compute="fast")
    assert compute_path(stored, fast, rates) == name and rates.product_flops(name) == 4e12
    assert compute_path(stored, fast, Rates(1e12, 1e10, 1e9)) == "dequant"
    assert compute_path(stored, Policy(), rates) == "dequant"
