"""The arithmetic of `penstock.formats.nf4`, by bitsandbytes."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from penstock.formats.nf4 import NF4
from penstock.formats.rows import Shape, row_slices
from penstock.quant.values.tensors import DTYPES, check_contiguous, output, row_amax

Kernel: TypeAlias = Callable[..., None]
"""Packed codes, maxima, target (pointers), block, rows, columns (long long)."""

_KERNELS: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.bfloat16: "cdequantize_blockwise_cpu_nf4_bf16",
        torch.float16: "cdequantize_blockwise_cpu_nf4_fp16",
        torch.float32: "cdequantize_blockwise_cpu_nf4_fp32",
    }
)
_KERNEL_RELEASES = ("0.49.", "0.50.")
"""Of bitsandbytes, whose sources give these functions the arguments of `Kernel`: a call with others
would write anywhere."""


def quantise(fmt: NF4, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Quantise to stored tensors, the same bytes as bitsandbytes gives, which makes them."""
    if not fmt.fits((weight.shape[0], weight.shape[1])):
        raise ValueError(f"rows of {weight.shape[1]} are not whole blocks of {fmt.block}")
    row_amax(weight, name)
    ops = _operators()
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, columns // fmt.block, device=weight.device)
    for part in row_slices(rows, columns, weight.device.type):
        codes, maxima = ops.quantize_4bit.default(
            weight[part].contiguous(), fmt.block, "nf4", torch.uint8
        )
        packed[part] = codes.view(-1, columns // 2)
        absmax[part] = maxima.view(-1, columns // fmt.block)
    return {"weight": packed, "weight_absmax": absmax}


def dequantise(
    fmt: NF4,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``code * absmax`` rounded to ``dtype``, by bitsandbytes' kernel of the device.

    On a CPU its operator can only return new tensors, whose pages cost more than decoding does; so
    its compiled function is called, which writes where it is told, and the operator by chunks only
    where that is not at hand.
    """
    packed, absmax = tensors["weight"], tensors["weight_absmax"]
    if fmt.nested_block:
        absmax = _maxima(fmt, tensors)
    if fmt.flat:
        packed = packed.view(shape[0], shape[1] // 2)
        absmax = absmax.view(shape[0], shape[1] // fmt.block)
    out = output(out, shape, dtype, packed.device)
    ops = _operators()
    if packed.device.type == "cuda":
        ops.dequantize_4bit.out(
            packed.view(-1, 1), absmax.view(-1), fmt.block, "nf4", shape, dtype, out=out
        )
        return out
    kernel = compiled_kernel(dtype) if packed.device.type == "cpu" else None
    if kernel is not None:
        return _into(fmt, kernel, packed, absmax, out)
    for part in row_slices(*shape, packed.device.type):
        target = out[part]
        codes, maxima = packed[part].view(-1, 1), absmax[part].view(-1)
        target.copy_(
            ops.dequantize_4bit.default(codes, maxima, fmt.block, "nf4", target.shape, dtype)
        )
    return out


def _maxima(fmt: NF4, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the blocks' maxima from codes of their own: ``map[code] * maximum + offset``."""
    codes = tensors["weight_absmax"]
    found = tensors["weight_nested_map"].index_select(0, codes.int())
    # The last block of maxima may be short: repeated whole, then cut to those there are.
    whole = tensors["weight_nested_absmax"].repeat_interleave(fmt.nested_block)
    return found.mul_(whole[: len(found)]).add_(fmt.nested_offset)


def _into(fmt: NF4, kernel: Kernel, packed: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    rows, columns = out.shape
    stored = NF4(block=fmt.block).storage((rows, columns), "")
    for tensor, (name, (tag, shape)) in zip((packed, absmax), stored.items(), strict=True):
        check_contiguous(name, tensor, shape, DTYPES[tag])
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (packed, absmax, out)]
    kernel(*pointers, *map(ctypes.c_longlong, (fmt.block, rows, columns)))
    return out


def compiled_kernel(dtype: torch.dtype) -> Kernel | None:
    """Return bitsandbytes' compiled function that decodes to ``dtype`` on a CPU; None where its
    library did not load or is of a release whose arguments are not known."""
    library = importlib.import_module("bitsandbytes.cextension")
    release = importlib.import_module("bitsandbytes").__version__
    missing = isinstance(library.lib, library.ErrorHandlerMockBNBNativeLibrary)
    if missing or dtype not in _KERNELS or not release.startswith(_KERNEL_RELEASES):
        return None
    kernel: Kernel = getattr(library.lib, _KERNELS[dtype])
    return kernel


def _operators() -> Any:
    """Return bitsandbytes' registered operators; imported when first needed, for it takes
    seconds."""
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes
