"""NF4 as bitsandbytes stores it: two 4-bit codes a byte and an fp32 absolute maximum a block.

Source: `bitsandbytes.functional.quantize_4bit` with ``quant_type="nf4"`` and without nested
statistics; the code is the NormalFloat of QLoRA (arXiv:2305.14314). Its tensors are flat; here
they are shaped by the weight's rows, which are the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from penstock.quant.rows import (
    DTYPES,
    Shape,
    Spec,
    check_contiguous,
    chunk_rows,
    output,
    row_amax,
    row_slices,
)

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


@dataclass(frozen=True)
class NF4:
    """4-bit NormalFloat in blocks of ``block`` elements along a row.

    A row's length must be a multiple of ``block``: blocks then never straddle rows. Weights
    that are not are kept plain when a model is packed.
    """

    name: str = "nf4"
    block: int = 64

    def fits(self, shape: Shape) -> bool:
        """Whether rows are whole blocks."""
        return shape[1] % self.block == 0

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Packed codes (the first of a pair in the high bits) and the blocks' maxima."""
        rows, columns = shape
        return {
            "weight": ("U8", (rows, columns // 2)),
            "weight_absmax": ("F32", (rows, columns // self.block)),
        }

    def workspace_bytes(self, shape: Shape, device: torch.device) -> int:
        """A decoded chunk (fp32 at most), where only the operator can decode on a CPU; all other
        ways decode into the output."""
        return 0 if device.type == "cuda" else 4 * shape[1] * chunk_rows(*shape, device)

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Stored tensors, the same bytes as bitsandbytes gives.

        Raises:
            CheckpointError: NaN or Inf.
            ValueError: rows are not whole blocks.
        """
        if not self.fits((weight.shape[0], weight.shape[1])):
            raise ValueError(f"rows of {weight.shape[1]} are not whole blocks of {self.block}")
        row_amax(weight, name)
        ops = _operators()
        rows, columns = weight.shape
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(rows, columns // self.block, device=weight.device)
        for part in row_slices(rows, columns, weight.device):
            codes, maxima = ops.quantize_4bit.default(
                weight[part].contiguous(), self.block, "nf4", torch.uint8
            )
            packed[part] = codes.view(-1, columns // 2)
            absmax[part] = maxima.view(-1, columns // self.block)
        return {"weight": packed, "weight_absmax": absmax}

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """``code * absmax`` rounded to ``dtype``, by bitsandbytes' kernel of the device.

        On a CPU its operator can only return new tensors, whose pages cost more than decoding
        does; so its compiled function is called, which writes where it is told, and the operator
        by chunks only where that is not at hand.
        """
        packed, absmax = tensors["weight"], tensors["weight_absmax"]
        out = output(out, shape, dtype, packed.device)
        ops = _operators()
        if packed.device.type == "cuda":
            ops.dequantize_4bit.out(
                packed.view(-1, 1), absmax.view(-1), self.block, "nf4", shape, dtype, out=out
            )
            return out
        kernel = compiled_kernel(dtype) if packed.device.type == "cpu" else None
        if kernel is not None:
            return self._into(kernel, packed, absmax, out)
        for part in row_slices(*shape, packed.device):
            target = out[part]
            codes, maxima = packed[part].view(-1, 1), absmax[part].view(-1)
            target.copy_(
                ops.dequantize_4bit.default(codes, maxima, self.block, "nf4", target.shape, dtype)
            )
        return out

    def _into(self, kernel: Kernel, packed: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
        rows, columns = out.shape
        stored = self.storage((rows, columns), "")
        for tensor, (name, (tag, shape)) in zip((packed, absmax), stored.items(), strict=True):
            check_contiguous(name, tensor, shape, DTYPES[tag])
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (packed, absmax, out)]
        kernel(*pointers, *map(ctypes.c_longlong, (self.block, rows, columns)))
        return out


def compiled_kernel(dtype: torch.dtype) -> Kernel | None:
    """bitsandbytes' compiled function that decodes to ``dtype`` on a CPU; None where its library
    did not load or is of a release whose arguments are not known."""
    library = importlib.import_module("bitsandbytes.cextension")
    release = importlib.import_module("bitsandbytes").__version__
    missing = isinstance(library.lib, library.ErrorHandlerMockBNBNativeLibrary)
    if missing or dtype not in _KERNELS or not release.startswith(_KERNEL_RELEASES):
        return None
    kernel: Kernel = getattr(library.lib, _KERNELS[dtype])
    return kernel


def _operators() -> Any:
    """bitsandbytes' registered operators; imported when first needed, for it takes seconds."""
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes
