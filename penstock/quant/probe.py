"""Which compute paths a device has, found by trying them on a small product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.formats.formats import get_format
from penstock.formats.micro import E2M1_MAX
from penstock.formats.scaled import E4M3_MAX, Gemm
from penstock.quant.arithmetic import quantise
from penstock.quant.compute import (
    Fp8Gemm,
    Int8Gemm,
    KitchenInt8,
    KitchenMicro,
    LinearPath,
    Operands,
)
from penstock.quant.paths import Kernel

MIN_COSINE: Mapping[Gemm, float] = MappingProxyType(
    {"fp8": 0.998, "int8": 0.9995, "nvfp4": 0.97, "mxfp8": 0.997}
)
"""Cosine to the fp32 product, in the worst output row; a right kernel reaches 0.9989, 0.9999, 0.981
and 0.9983."""

MOST_OFF = 0.1
"""Of an output row's length; a right kernel is off by 0.01."""

PATHS: Mapping[Kernel, tuple[Gemm, LinearPath]] = MappingProxyType(
    {
        "fp8": ("fp8", Fp8Gemm()),
        "fp8-rowwise": ("fp8", Fp8Gemm(rowwise=True)),
        "int8": ("int8", Int8Gemm()),
    }
)
"""For each product the format whose weight it is tried on, and how it computes."""

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


def probe(device: torch.device | str) -> dict[Kernel, PathReport]:
    """Try each 8-bit product on ``device``, in bf16; dequantising always works and is not
    listed."""
    device = torch.device(device)
    return {
        kernel: _NO_CPU_FP8
        if (name, device.type) == ("fp8", "cpu")
        else try_path(name, path, device, torch.bfloat16)
        for kernel, (name, path) in PATHS.items()
    }


def probe_kitchen(device: torch.device | str) -> PathReport:
    """Try comfy-kitchen's int8 product on ``device``, in bf16.

    Its slow twin runs anywhere; what is wanted are its kernels, so it needs a CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return PathReport(False, None, "it needs a CUDA device")
    return try_path("int8", KitchenInt8(), device, torch.bfloat16)


MICRO: Mapping[Gemm, int] = MappingProxyType({"nvfp4": 10, "mxfp8": 10})
"""Products of comfy-kitchen in blocks with a scale each, and the first compute capability whose
tensor cores have them: Blackwell's."""


def probe_micro(device: torch.device | str) -> dict[Gemm, PathReport]:
    """Try comfy-kitchen's products in NVFP4 and MXFP8 on ``device``, in bf16."""
    return {name: _tried_micro(name, torch.device(device)) for name in MICRO}


def _tried_micro(name: Gemm, device: torch.device) -> PathReport:
    if device.type != "cuda" or not torch.cuda.is_available():
        return PathReport(False, None, "it needs a CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if major < MICRO[name]:
        told = f"sm{major}{minor} has no such tensor cores; sm{MICRO[name]}0 or newer is needed"
        return PathReport(False, None, told)
    return try_path(name, KitchenMicro(name), device, torch.bfloat16)


def in_blocks(name: Gemm, weight: Tensor) -> dict[str, Tensor]:
    """Return ``weight`` as comfy-kitchen stores it in a format that penstock only reads.

    Raises:
        ImportError: comfy-kitchen is not installed.
    """
    import comfy_kitchen as kitchen

    if name == "mxfp8":
        codes, scales = kitchen.quantize_mxfp8(weight)
        return {"weight": codes, "weight_scale": scales}
    whole = weight.abs().max() / (E4M3_MAX * E2M1_MAX)
    codes, scales = kitchen.quantize_nvfp4(weight, whole)
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}


def working(reports: Mapping[Kernel, PathReport]) -> frozenset[Kernel]:
    """Return the products that work, as `Computing` wants them."""
    return frozenset(name for name, report in reports.items() if report.works)


def try_path(name: Gemm, path: LinearPath, device: torch.device, dtype: torch.dtype) -> PathReport:
    """Run ``path`` on Gaussian tokens and a weight of the format ``name`` whose rows are of very
    unlike size, with a bias as large as its products, and compares with the fp32 product of the
    weight before quantising."""
    fmt = get_format(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS, generator=generator)
    size = torch.logspace(-3, 0, _ROWS)
    weight *= size[:, None]
    x = torch.randn(_TOKENS, _COLUMNS, generator=generator).to(device, dtype)
    bias = (torch.randn(_ROWS, generator=generator) * size * _COLUMNS**0.5).to(device, dtype)
    try:
        stored = quantise(fmt, weight) if fmt.writable else in_blocks(name, weight)
        tensors = {suffix: each.to(device) for suffix, each in stored.items()}
        found = path(Operands(fmt, (_ROWS, _COLUMNS), tensors, bias), x)
        found = (found.float() - bias.float()).cpu()
    except ImportError as error:
        return PathReport(False, None, f"{error}; the extra 'fast' of penstock installs it")
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as refusal:
        return PathReport(False, None, str(refusal).partition("\n")[0])
    return _verdict(name, found, F.linear(x.float().cpu(), weight))


def _verdict(name: Gemm, found: Tensor, reference: Tensor) -> PathReport:
    if not bool(torch.isfinite(found).all()):
        return PathReport(False, None, "the result is not finite")
    # By output row, so that rows with small weights count as much as those with large ones.
    cosine = float(F.cosine_similarity(found, reference, dim=0).min())
    if cosine < MIN_COSINE[name]:
        return PathReport(False, cosine, f"cosine {cosine:.5f}, at least {MIN_COSINE[name]} wanted")
    # A row that is scaled wrongly points where it should
    sizes = found.norm(dim=0) / reference.norm(dim=0)
    worst = float(sizes[(sizes - 1).abs().argmax()])
    if abs(worst - 1) > MOST_OFF:
        return PathReport(False, cosine, f"a row is {worst:.2f} times as large as it should be")
    return PathReport(True, cosine, "")
