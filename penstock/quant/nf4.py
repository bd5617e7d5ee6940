"""NF4 as bitsandbytes stores it: two 4-bit codes a byte and an fp32 absolute maximum a block.

Source: `bitsandbytes.functional.quantize_4bit` with ``quant_type="nf4"`` and without nested
statistics; the code is the NormalFloat of QLoRA (arXiv:2305.14314). Its tensors are flat; here
they are shaped by the weight's rows, which are the same bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.quant.rows import Shape, Spec, output, row_amax, row_slices

_CHUNK = 1 << 20


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
        """A decoded chunk (fp32 at most); CUDA decodes into the output."""
        if device.type == "cuda":
            return 0
        return 4 * min(shape[0] * shape[1], max(_CHUNK, shape[1]))

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
        """``code * absmax`` rounded to ``dtype``, by bitsandbytes' kernel of the device."""
        packed, absmax = tensors["weight"], tensors["weight_absmax"]
        out = output(out, shape, dtype, packed.device)
        ops = _operators()
        if packed.device.type == "cuda":
            ops.dequantize_4bit.out(
                packed.view(-1, 1), absmax.view(-1), self.block, "nf4", shape, dtype, out=out
            )
            return out
        step = max(1, _CHUNK // shape[1])
        for start in range(0, shape[0], step):
            part = slice(start, min(shape[0], start + step))
            size = (part.stop - part.start, shape[1])
            codes, maxima = packed[part].view(-1, 1), absmax[part].view(-1)
            # The kernel only returns new tensors: small ones are recycled, a whole one is not.
            out[part] = ops.dequantize_4bit.default(codes, maxima, self.block, "nf4", size, dtype)
        return out


def _operators() -> Any:
    """bitsandbytes' registered operators; imported when first needed, for it takes seconds."""
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes
