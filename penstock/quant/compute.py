"""How a linear over quantised storage computes: one strategy object a path, chosen once by
`penstock.quant.paths`.

- `Dequant`, the reference: decode the weight into one shared scratch buffer, then `F.linear`.
- `Fp8Gemm`: `torch._scaled_mm` on e4m3 weights and activations scaled by token.
- `Int8Gemm`: `torch._int_mm` on int8 weights and activations scaled by token.

The 8-bit products use unit scales and multiply their output by the tokens' and the rows' scales:
row-wise scaling inside `_scaled_mm` is not there on every architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.quant.format import QuantFormat
from penstock.quant.paths import DEFAULT_CHUNK_BYTES, GEMM_MULTIPLE, Computing, Path, Scratch
from penstock.quant.plain import Plain
from penstock.quant.rows import Shape
from penstock.quant.scaled import E4M3_MAX, INT8_MAX, Scaled8

_CUDA_MIN_ROWS = 17


@dataclass(frozen=True)
class Operands:
    """What a path is given of a linear: its format, weight shape, stored tensors and bias."""

    format: QuantFormat
    shape: Shape
    tensors: Mapping[str, Tensor]
    bias: Tensor | None


class Compute(Protocol):
    """One way to apply a quantised linear."""

    @property
    def path(self) -> Path:
        """Its name in plans and reports."""

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """``x`` (..., in features) -> (..., out features), in the dtype of ``x``."""


@dataclass(frozen=True)
class Dequant:
    """Decode into ``scratch``, multiply: bit-equal to `F.linear` on the dequantised weight."""

    scratch: Scratch
    path: Path = field(default="dequant", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `Compute`; a plain weight already in the dtype of ``x`` is used where it lies."""
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        if isinstance(linear.format, Plain) and linear.tensors["weight"].dtype == x.dtype:
            return F.linear(x, linear.tensors["weight"], bias)
        out = self.scratch.view(linear.shape, x.dtype)
        return F.linear(
            x, linear.format.dequantise(linear.tensors, linear.shape, x.dtype, out), bias
        )


@dataclass(frozen=True)
class Fp8Gemm:
    """e4m3 by e4m3; activations are divided by their token's largest magnitude / 448.

    ``chunk_bytes`` bounds the temporaries: tokens are taken in as many chunks as that needs.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    path: Path = field(default="fp8", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `Compute`."""
        weight, scale = _operands(linear)
        unit = torch.ones((), device=x.device)

        def product(tokens: Tensor) -> tuple[Tensor, Tensor]:
            codes, token_scale = quantise_tokens(tokens, torch.float8_e4m3fn)
            out = torch._scaled_mm(
                codes, weight.t(), scale_a=unit, scale_b=unit, out_dtype=torch.float32
            )
            return out, token_scale

        return _by_tokens(product, linear, scale, x, self.chunk_bytes)


@dataclass(frozen=True)
class Int8Gemm:
    """int8 by int8 into int32; activations are divided by their token's largest magnitude / 127.

    ``chunk_bytes`` bounds the temporaries, the int32 product among them; sums are exact, so chunks
    change no bit of the result.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    path: Path = field(default="int8", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `Compute`."""
        weight, scale = _operands(linear)

        def product(tokens: Tensor) -> tuple[Tensor, Tensor]:
            codes, token_scale = quantise_tokens(tokens, torch.int8)
            rows = len(codes)
            if codes.is_cuda and rows < _CUDA_MIN_ROWS:
                codes = F.pad(codes, (0, 0, 0, 2 * GEMM_MULTIPLE - rows))
            return torch._int_mm(codes, weight.t())[:rows].float(), token_scale

        return _by_tokens(product, linear, scale, x, self.chunk_bytes)


def quantise_tokens(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit codes of ``tokens`` (n, features) and their fp32 scales (n, 1); ``code * scale`` is the
    value. A token of zeros gets scale 1; one with NaN or Inf a scale that is not finite."""
    norm = torch.linalg.vector_norm(tokens, torch.inf, dim=-1, keepdim=True)
    largest = INT8_MAX if dtype == torch.int8 else E4M3_MAX
    scale = norm.float() / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = tokens.to(torch.float32, copy=True).div_(scale)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


class _Product(Protocol):
    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


def _operands(linear: Operands) -> tuple[Tensor, Tensor | None]:
    if not isinstance(linear.format, Scaled8):
        raise TypeError(f"{linear.format.name} has no 8-bit operands")
    return linear.format.operands(linear.tensors)


def gemm_chunk_rows(shape: Shape, chunk_bytes: int) -> int:
    """Tokens whose temporaries fit ``chunk_bytes``, at least one: fp32 and 8-bit tokens, the 32-bit
    product and its fp32 copy."""
    rows, columns = shape
    return max(1, chunk_bytes // (5 * columns + 8 * rows))


def _by_tokens(
    product: _Product, linear: Operands, scale: Tensor | None, x: Tensor, chunk_bytes: int
) -> Tensor:
    tokens = x.reshape(-1, linear.shape[1])
    out = torch.empty(len(tokens), linear.shape[0], dtype=x.dtype, device=x.device)
    step = gemm_chunk_rows(linear.shape, chunk_bytes)
    for start in range(0, len(tokens), step):
        part, token_scale = product(tokens[start : start + step])
        part.mul_(token_scale)
        if scale is not None:
            part.mul_(scale.reshape(1, -1))
        if linear.bias is not None:
            part.add_(linear.bias)
        out[start : start + step] = part
    return out.view(*x.shape[:-1], linear.shape[0])


def strategy_for(computing: Computing, fmt: QuantFormat, shape: Shape) -> Compute:
    """What computes one linear on the path that ``computing`` chooses."""
    path = computing.path_for(fmt, shape)
    if path == "dequant":
        return Dequant(computing.scratch)
    return (Fp8Gemm if path == "fp8" else Int8Gemm)(computing.chunk_bytes)
