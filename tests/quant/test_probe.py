"""The probe: finds working paths, and says why others do not work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.formats.scaled import Gemm
from penstock.quant.compute import Fp8Gemm, Int8Gemm, Operands
from penstock.quant.probe import MIN_COSINE, PATHS, probe, try_path, working

CPU = torch.device("cpu")


def test_a_cpu_multiplies_in_int8_and_not_in_fp8_which_torch_does_one_by_one() -> None:
    reports = probe("cpu")
    assert set(reports) == {"fp8", "fp8-rowwise", "int8"} and working(reports) == {"int8"}
    int8, fp8 = reports["int8"], reports["fp8"]
    assert int8.cosine is not None and int8.cosine >= MIN_COSINE["int8"] and not int8.reason
    assert "one by one" in fp8.reason and reports["fp8-rowwise"] == fp8


@dataclass(frozen=True)
class Wrong:
    """A kernel that answers without error, but wrongly."""

    fault: str
    path: Gemm = "int8"

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        out = Int8Gemm()(linear, x)
        if self.fault == "nan":
            out[3, 5] = torch.nan
        elif self.fault == "one scale for all rows":
            return out / linear.tensors["weight_scale"].flatten() * torch.randn(len(out), 1)
        elif self.fault == "one row":
            out[:, 0] = out[:, 0].flip(0)
        elif self.fault == "no bias":
            return Int8Gemm()(replace(linear, bias=None), x)
        elif self.fault == "refuses":
            raise RuntimeError("not supported on this architecture\nat file.cpp")
        return out


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", "not finite"),
        ("one scale for all rows", "cosine"),
        ("one row", "cosine"),
        ("no bias", "cosine"),
        ("refuses", "not supported on this architecture"),
    ],
)
def test_a_wrong_kernel_is_found(fault: str, reason: str) -> None:
    report = try_path("int8", Wrong(fault), CPU, torch.bfloat16)
    assert not report.works and reason in report.reason and "\n" not in report.reason
    assert working({"int8": report}) == frozenset()


def test_the_right_kernel_passes_where_the_wrong_ones_fail() -> None:
    assert try_path("int8", Wrong("none"), CPU, torch.bfloat16).works
    assert try_path("fp8", Fp8Gemm(), CPU, torch.float32).works
    assert try_path("fp8", Fp8Gemm(rowwise=True), CPU, torch.bfloat16).works


def test_a_device_without_row_wise_scales_has_the_product_with_unit_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = torch._scaled_mm

    def old(*operands: Tensor, scale_a: Tensor, **others: Any) -> Tensor:
        if scale_a.numel() > 1:
            raise RuntimeError("no row-wise scales here")
        return kernel(*operands, scale_a=scale_a, **others)

    monkeypatch.setattr(torch, "_scaled_mm", old)
    reports = {
        kernel: try_path(name, path, CPU, torch.bfloat16) for kernel, (name, path) in PATHS.items()
    }
    assert working(reports) == {"fp8", "int8"}
    assert reports["fp8-rowwise"].reason == "no row-wise scales here"


def test_importing_asks_no_device_and_loads_no_quantisation_library() -> None:
    code = (
        "import sys, torch\n"
        "def refuse(*a): raise AssertionError('a device was queried at import')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import penstock.quant.linear, penstock.quant.probe, penstock.formats.recognise\n"
        "import penstock.quant.policy\n"
        "assert not {'bitsandbytes', 'optimum', 'gguf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
