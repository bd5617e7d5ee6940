"""Which compute paths a device has, found by trying them on a small product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.quant.compute import Compute, Fp8Gemm, Int8Gemm, Operands
from penstock.quant.format import get_format
from penstock.quant.scaled import Gemm

MIN_COSINE: Mapping[Gemm, float] = MappingProxyType({"fp8": 0.998, "int8": 0.9995})
"""Cosine to the fp32 product, in the worst output row; a right kernel reaches 0.9989 and 0.9999."""

_TOKENS, _COLUMNS, _ROWS = 48, 256, 64


@dataclass(frozen=True)
class PathReport:
    """What came of trying one path.

    Attributes:
        cosine: to the fp32 reference; None if the kernel refused.
        reason: why it does not work; empty if it does.
    """

    works: bool
    cosine: float | None
    reason: str


_NO_CPU_FP8 = PathReport(
    False, None, "torch multiplies fp8 on a CPU one by one, hundreds of times slower than decoded"
)


def probe(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> dict[Gemm, PathReport]:
    """Tries each 8-bit path on ``device``; dequantising always works and is not listed."""
    device = torch.device(device)
    paths: dict[Gemm, Compute] = {"fp8": Fp8Gemm(), "int8": Int8Gemm()}
    return {
        name: _NO_CPU_FP8
        if (name, device.type) == ("fp8", "cpu")
        else try_path(name, path, device, dtype)
        for name, path in paths.items()
    }


def working(reports: Mapping[Gemm, PathReport]) -> frozenset[Gemm]:
    """The paths that work, as `Computing` wants them."""
    return frozenset(name for name, report in reports.items() if report.works)


def try_path(name: Gemm, path: Compute, device: torch.device, dtype: torch.dtype) -> PathReport:
    """Runs ``path`` on Gaussian tokens and a weight of the format ``name`` whose rows are of very
    unlike size, and compares with the fp32 product of the weight before quantising."""
    fmt = get_format(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator)
    weight *= torch.logspace(-3, 0, _ROWS)[:, None]
    x = torch.randn(_TOKENS, _COLUMNS, generator=generator).to(device, dtype)
    tensors = {suffix: each.to(device) for suffix, each in fmt.quantise(weight).items()}
    try:
        found = path(Operands(fmt, (_ROWS, _COLUMNS), tensors, None), x)
        found = found.float().cpu()
    except (RuntimeError, ValueError) as refusal:
        return PathReport(False, None, str(refusal).partition("\n")[0])
    return _verdict(name, found, F.linear(x.float().cpu(), weight))


def _verdict(name: Gemm, found: Tensor, reference: Tensor) -> PathReport:
    if not bool(torch.isfinite(found).all()):
        return PathReport(False, None, "the result is not finite")
    # By output row, so that rows with small weights count as much as those with large ones.
    cosine = float(F.cosine_similarity(found, reference, dim=0).min())
    if cosine < MIN_COSINE[name]:
        return PathReport(False, cosine, f"cosine {cosine:.5f}, at least {MIN_COSINE[name]} wanted")
    return PathReport(True, cosine, "")
