"""How a linear over quantised storage computes: one strategy object a path, chosen once by
`penstock.quant.paths`.

- `Dequant`, the reference: decode the weight into one shared scratch buffer, then `F.linear`.
- `Fp8Gemm`: `torch._scaled_mm` on e4m3 weights and activations scaled by token.
- `Int8Gemm`: `torch._int_mm` on int8 weights and activations scaled by token.
- `KitchenInt8`: the same by comfy-kitchen, whose kernel scales what it multiplies.
- `KitchenMicro`: NVFP4 or MXFP8 by NVFP4 or MXFP8, by comfy-kitchen.

An 8-bit product has unit scales, and its output is multiplied by the tokens' and the rows' in two
passes. Row-wise scales inside `_scaled_mm` need none; not every architecture and system has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.formats.formats import QuantFormat
from penstock.formats.micro import E2M1_MAX, Micro
from penstock.formats.rows import Shape
from penstock.formats.scaled import E4M3_MAX, INT8_MAX, Scaled8
from penstock.quant.arithmetic import dequantise
from penstock.quant.paths import (
    DEFAULT_CHUNK_BYTES,
    GEMM_MULTIPLE,
    Computing,
    Path,
    Scratch,
    gemm_fixed_bytes,
    gemm_token_bytes,
)
from penstock.quant.values.rotation import unit_rotation
from penstock.quant.values.scaled import operands

_CUDA_MIN_ROWS = 17


@dataclass(frozen=True)
class Operands:
    """What a path is given of a linear: its format, weight shape, stored tensors and bias."""

    format: QuantFormat
    shape: Shape
    tensors: Mapping[str, Tensor]
    bias: Tensor | None


class LinearPath(Protocol):
    """One way to apply a quantised linear."""

    @property
    def path(self) -> Path:
        """Its name in plans and reports."""

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """Map ``x`` (..., in features) -> (..., out features), in the dtype of ``x``."""


@dataclass(frozen=True)
class Dequant:
    """Decode into ``scratch``, multiply: bit-equal to `F.linear` on the dequantised weight."""

    scratch: Scratch
    path: Path = field(default="dequant", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `LinearPath`; a plain weight already in the dtype of ``x`` is used where it lies."""
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        if linear.format.plain and linear.tensors["weight"].dtype == x.dtype:
            return F.linear(x, linear.tensors["weight"], bias)
        out = self.scratch.view(linear.shape, x.dtype)
        return F.linear(
            x, dequantise(linear.format, linear.tensors, linear.shape, x.dtype, out), bias
        )


@dataclass(frozen=True)
class Fp8Gemm:
    """e4m3 by e4m3; activations are divided by their token's largest magnitude / 448.

    ``chunk_bytes`` bounds the temporaries: tokens are taken in as many chunks as that needs.
    ``rowwise`` leaves scales and bias of a bf16 product to `_scaled_mm`; not every torch that can
    has such a kernel for other dtypes.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    rowwise: bool = False
    path: Path = field(default="fp8", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `LinearPath`."""
        rowwise = self.rowwise and x.dtype == torch.bfloat16
        product = _rowwise_fp8(linear) if rowwise else _unit_fp8(linear)
        size = gemm_token_bytes(linear.shape, x.device.type, rowwise=rowwise)
        return _by_tokens(product, linear.shape, x, size, self.chunk_bytes)


@dataclass(frozen=True)
class Int8Gemm:
    """int8 by int8 into int32; activations are divided by their token's largest magnitude / 127.

    ``chunk_bytes`` bounds the temporaries, the int32 product among them; sums are exact, so chunks
    change no bit of the result.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    path: Path = field(default="int8", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `LinearPath`."""
        weight, row_scale = _operands(linear)

        rotation = linear.format.rotation if isinstance(linear.format, Scaled8) else 0

        def product(tokens: Tensor, out: Tensor) -> None:
            if rotation:
                turned = unit_rotation(tokens.float().contiguous(), rotation)
                tokens = turned.mul_(rotation**-0.5)
            codes, token_scale = quantise_tokens(tokens, torch.int8)
            rows = len(codes)
            # On CUDA `_int_mm` wants 17 rows or more: zeros are added, and cut off again.
            if codes.is_cuda and rows < _CUDA_MIN_ROWS:
                codes = F.pad(codes, (0, 0, 0, 2 * GEMM_MULTIPLE - rows))
            part = torch._int_mm(codes, weight.t())[:rows]
            _rescale(part, token_scale, row_scale, linear.bias, out)

        size = gemm_token_bytes(linear.shape, x.device.type, rotated=bool(rotation))
        return _by_tokens(product, linear.shape, x, size, self.chunk_bytes)


@dataclass(frozen=True)
class KitchenInt8:
    """int8 by int8 as comfy-kitchen's ``int8_linear`` makes it: it quantises the tokens (and turns
    them for ConvRot), and scales inside the product. Imported when it is called.

    ``chunk_bytes`` bounds the temporaries.
    """

    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    path: Path = field(default="int8", init=False)

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `LinearPath`."""
        from comfy_kitchen import int8_linear

        weight, row_scale = _operands(linear)
        scale, bias = row_scale.reshape(-1), linear.bias
        rotation = linear.format.rotation if isinstance(linear.format, Scaled8) else 0

        def product(tokens: Tensor, out: Tensor) -> None:
            made = int8_linear(
                tokens, weight, scale, None if bias is None else bias.to(out.dtype),
                out_dtype=out.dtype, convrot=bool(rotation), convrot_groupsize=rotation or 256,
            )  # fmt: skip
            out.copy_(made)

        size = gemm_token_bytes(linear.shape, x.device.type, rotated=bool(rotation), kitchen=True)
        return _by_tokens(product, linear.shape, x, size, self.chunk_bytes)


@dataclass(frozen=True)
class KitchenMicro:
    """NVFP4 by NVFP4, or MXFP8 by MXFP8: comfy-kitchen quantises the tokens by blocks of a row, and
    its product takes both operands' scales. Imported when it is called.

    ``chunk_bytes`` bounds the temporaries. The scale for all of NVFP4 is that of a chunk's tokens.
    """

    path: Path
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    def __call__(self, linear: Operands, x: Tensor) -> Tensor:
        """As `LinearPath`."""
        multiply = _MICRO[self.path]

        def product(tokens: Tensor, out: Tensor) -> None:
            bias = None if linear.bias is None else linear.bias.to(out.dtype)
            out.copy_(multiply(tokens.contiguous(), linear.tensors, bias)[: len(tokens)])

        size = gemm_token_bytes(linear.shape, x.device.type, kitchen=True)
        return _by_tokens(product, linear.shape, x, size, self.chunk_bytes)


def _nvfp4(tokens: Tensor, weight: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    import comfy_kitchen as kitchen

    largest = torch.linalg.vector_norm(tokens, torch.inf).float()
    whole = (largest / (E4M3_MAX * E2M1_MAX)).masked_fill_(largest == 0, 1)
    codes, scales = kitchen.quantize_nvfp4(tokens, whole, pad_16x=True)
    found: Tensor = kitchen.scaled_mm_nvfp4(
        codes, weight["weight"].view(torch.uint8), whole, weight["weight_scale_2"].reshape(()),
        scales, weight["weight_scale"].view(torch.float8_e4m3fn), bias, tokens.dtype,
    )  # fmt: skip
    return found


def _mxfp8(tokens: Tensor, weight: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    import comfy_kitchen as kitchen

    codes, scales = kitchen.quantize_mxfp8(tokens, pad_32x=True)
    found: Tensor = kitchen.scaled_mm_mxfp8(
        codes, weight["weight"].view(torch.float8_e4m3fn), scales,
        weight["weight_scale"].view(torch.float8_e8m0fnu), bias, tokens.dtype,
    )  # fmt: skip
    return found


_MICRO = {"nvfp4": _nvfp4, "mxfp8": _mxfp8}


def quantise_tokens(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes of ``tokens`` (n, features), row by row, and their fp32 scales (n, 1);
    ``code * scale`` is the value. A token of zeros gets scale 1; one with NaN or Inf a scale that
    is not finite."""
    # The largest magnitude without a copy of |tokens|, as abs().amax() would make.
    norm = torch.linalg.vector_norm(tokens, torch.inf, dim=-1, keepdim=True)
    scale = norm.float() / (INT8_MAX if dtype == torch.int8 else E4M3_MAX)
    scale.masked_fill_(scale == 0, 1)
    # The quotients are fp32, and fp8 is rounded from them by the division itself.
    codes = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    if dtype == torch.int8:
        codes.copy_(torch.div(tokens, scale).round_())
    else:
        torch.div(tokens, scale, out=codes)
    return codes, scale


class _Product(Protocol):
    """Multiplies ``tokens`` (n, in features) into ``out`` (n, out features)."""

    def __call__(self, tokens: Tensor, out: Tensor) -> None: ...


def _operands(linear: Operands) -> tuple[Tensor, Tensor]:
    """Return the 8-bit weight and its rows' scales: fp32, contiguous, (1, rows)."""
    if not isinstance(linear.format, Scaled8):
        raise TypeError(f"{linear.format.name} has no 8-bit operands")
    weight, scale = operands(linear.format, linear.tensors)
    if scale is None:
        scale = torch.ones(1, 1, device=weight.device)
    return weight, scale.float().reshape(1, -1).expand(1, len(weight)).contiguous()


def _rowwise_fp8(linear: Operands) -> _Product:
    weight, row_scale = _operands(linear)

    def product(tokens: Tensor, out: Tensor) -> None:
        codes, scale = quantise_tokens(tokens, torch.float8_e4m3fn)
        bias = None if linear.bias is None else linear.bias.to(out.dtype)
        torch._scaled_mm(
            codes, weight.t(), scale_a=scale, scale_b=row_scale,
            bias=bias, out_dtype=out.dtype, out=out,
        )  # fmt: skip

    return product


def _unit_fp8(linear: Operands) -> _Product:
    weight, row_scale = _operands(linear)
    unit = torch.ones((), device=weight.device)

    def product(tokens: Tensor, out: Tensor) -> None:
        codes, token_scale = quantise_tokens(tokens, torch.float8_e4m3fn)
        part = torch._scaled_mm(
            codes, weight.t(), scale_a=unit, scale_b=unit, out_dtype=torch.float32
        )
        _rescale(part, token_scale, row_scale, linear.bias, out)

    return product


def _rescale(
    part: Tensor, token_scale: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Scale the 32-bit ``part`` in fp32, rounded into ``out`` once: two passes over
    memory.

    The first writes where it reads (int32 and fp32 are of one size), so ``part`` is lost.
    """
    # part (n, out features) times (n, 1), then times (1, out features): scales of tokens and rows
    # multiply from both sides, so neither needs the product to be made again.
    scaled = torch.mul(part, token_scale, out=part.view(torch.float32))
    if bias is None:
        torch.mul(scaled, row_scale, out=out)
    else:
        torch.addcmul(bias, scaled, row_scale, out=out)


def gemm_chunk(shape: Shape, token_bytes: int, chunk_bytes: int) -> int:
    """Return the tokens whose temporaries, of ``token_bytes`` each, fit ``chunk_bytes``; at least
    one."""
    return max(1, (chunk_bytes - gemm_fixed_bytes(shape)) // token_bytes)


def _by_tokens(
    product: _Product, shape: Shape, x: Tensor, token_bytes: int, chunk_bytes: int
) -> Tensor:
    tokens = x.reshape(-1, shape[1])
    out = torch.empty(len(tokens), shape[0], dtype=x.dtype, device=x.device)
    step = gemm_chunk(shape, token_bytes, chunk_bytes)
    for start in range(0, len(tokens), step):
        product(tokens[start : start + step], out[start : start + step])
    return out.view(*x.shape[:-1], shape[0])


def strategy_for(computing: Computing, fmt: QuantFormat, shape: Shape) -> LinearPath:
    """Return what computes one linear on the path that ``computing`` chooses."""
    path = computing.path_for(fmt, shape)
    if path == "dequant":
        return Dequant(computing.scratch)
    if isinstance(fmt, Micro):
        return KitchenMicro(path, computing.chunk_bytes)
    if computing.is_kitchens(fmt, shape):
        return KitchenInt8(computing.chunk_bytes)
    if path == "int8":
        return Int8Gemm(computing.chunk_bytes)
    return Fp8Gemm(computing.chunk_bytes, "fp8-rowwise" in computing.working)
