"""Eight bits a weight and a scale a row: fp8 e4m3fn and symmetric int8, under every spelling.

One storage, several authors: ours, LightX2V's and ComfyUI's (``weight`` + ``weight_scale``) and
optimum-quanto's (``weight._data`` + ``weight._scale``) differ in names and in the scale's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from penstock.quant.rows import (
    DTYPES,
    Shape,
    Spec,
    chunk_rows,
    output,
    row_amax,
    row_slices,
)

ScaleLayout: TypeAlias = Literal["none", "scalar", "one", "one_one", "row", "column"]
"""Shape of the scale: absent, (), (1,), (1, 1), (rows,) or (rows, 1)."""

Gemm: TypeAlias = Literal["fp8", "int8"]

E4M3_MAX = 448.0
INT8_MAX = 127.0


def scale_shape(layout: ScaleLayout, rows: int) -> tuple[int, ...]:
    """The shape that ``layout`` names for a weight of ``rows`` rows."""
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "one": (1,),
        "one_one": (1, 1),
        "row": (rows,),
        "column": (rows, 1),
    }
    return shapes[layout]


@dataclass(frozen=True)
class Scaled8:
    """A weight of one byte an element: ``value = stored * scale``.

    Quantising rounds ``weight / scale`` to nearest even with ``scale = max |row| / largest`` (448
    for e4m3fn, 127 for int8); a row of zeros gets the smallest scale. One scale for the whole
    tensor is read but is no default: a few outliers cost int8 eight times the error.

    Attributes:
        tag: "F8_E4M3" or "I8".
        gemm: the 8-bit matrix product that can use it; None where the file forbids that.
        scale: layout of the scale; "none" is a raw cast.
        scale_tag: dtype of the scale; None means the compute dtype, as optimum-quanto does.
    """

    name: str
    tag: Literal["F8_E4M3", "I8"]
    gemm: Gemm | None
    scale: ScaleLayout = "column"
    scale_tag: str | None = "F32"
    weight_key: str = "weight"
    scale_key: str = "weight_scale"

    def __post_init__(self) -> None:
        if self.tag == "I8" and self.scale == "none":
            raise ValueError("int8 without a scale has no meaning")

    def fits(self, shape: Shape) -> bool:
        """Every shape can be stored."""
        return True

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """The weight's bytes and, unless raw, its scale."""
        stored: dict[str, Spec] = {self.weight_key: (self.tag, shape)}
        if self.scale != "none":
            tag = self.scale_tag or compute_dtype
            stored[self.scale_key] = (tag, scale_shape(self.scale, shape[0]))
        return stored

    def workspace_bytes(self, shape: Shape, device: torch.device) -> int:
        """The scale in fp32, and on a CPU a chunk in fp32, for fp8 its bits besides and the largest
        of them; other devices decode in place."""
        if device.type != "cpu":
            return 4 * shape[0]
        item = 4 if self.tag == "I8" else 4 + 2 + 1
        return 4 * shape[0] + item * shape[1] * chunk_rows(*shape, device) + 1

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Stored tensors of ``weight`` (2-D, floating point).

        Raises:
            CheckpointError: NaN or Inf.
        """
        scale = self._fresh_scale(row_amax(weight, name), weight.dtype)
        stored = torch.empty_like(weight, dtype=DTYPES[self.tag])
        for rows in row_slices(weight.shape[0], weight.shape[1], weight.device):
            part = weight[rows].to(torch.float32, copy=True)
            if scale is not None:
                part.div_(scale[rows] if len(scale) == len(weight) else scale)
            stored[rows] = _round(part, self.tag)
        if scale is None:
            return {self.weight_key: stored}
        return {
            self.weight_key: stored,
            self.scale_key: scale_as(scale, self.scale, len(weight), self.scale_tag),
        }

    def _fresh_scale(self, amax: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.scale == "none":
            return None
        whole = self.scale in ("scalar", "one", "one_one")
        largest = E4M3_MAX if self.tag == "F8_E4M3" else INT8_MAX
        scale = (amax.max().reshape(1, 1) if whole else amax) / largest
        stored = scale.to(dtype if self.scale_tag is None else DTYPES[self.scale_tag])
        info = torch.finfo(stored.dtype)
        # Never 0: not for rows of zeros, and not where fp16 underflows (rows below 1e-5).
        return stored.clamp_(min=info.tiny * info.eps)

    def operands(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The 8-bit weight ``(rows, columns)`` and its scale, ``(rows, 1)`` or ``(1, 1)``."""
        weight = tensors[self.weight_key]
        if self.scale == "none":
            return weight, None
        return weight, tensors[self.scale_key].reshape(-1, 1)

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """``stored * scale``, computed in fp32 and rounded once to ``dtype``."""
        weight, scale = self.operands(tensors)
        out = output(out, shape, dtype, weight.device)
        if weight.device.type == "cpu":
            return _by_chunks(weight, scale, out)
        # Both stored types are exact in every compute dtype: one rounding here as well.
        return out.copy_(weight) if scale is None else out.copy_(weight).mul_(scale.float())


def _round(part: Tensor, tag: str) -> Tensor:
    if tag == "I8":
        return part.round_().clamp_(-INT8_MAX, INT8_MAX)
    # Older torch makes NaN of what e4m3fn cannot hold; newer saturates.
    return part.clamp_(-E4M3_MAX, E4M3_MAX)


def scale_as(scale: Tensor, layout: ScaleLayout, rows: int, tag: str | None) -> Tensor:
    """``scale`` in the shape that ``layout`` names."""
    dtype = scale.dtype if tag is None else DTYPES[tag]
    return scale.to(dtype).reshape(scale_shape(layout, rows))


def _by_chunks(weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Walks the rows so that what is in work stays in the cache; bit-equal to the whole product."""
    rows, columns = weight.shape
    size = chunk_rows(rows, columns, weight.device)
    bits = torch.empty(size, columns, dtype=torch.int16) if weight.is_floating_point() else None
    chunk = None if _decodes_into(out.dtype, weight, scale) else torch.empty(size, columns)
    if scale is not None:
        scale = scale.to(out.dtype if chunk is None else torch.float32).expand(rows, 1)
    for part in row_slices(rows, columns, weight.device):
        target = out[part]
        work = target if chunk is None else chunk[: len(target)]
        if bits is None:
            work.copy_(weight[part])
        else:
            _decode_e4m3(weight[part], bits[: len(target)], work)
        if scale is not None:
            work.mul_(scale[part])
        if chunk is not None:
            target.copy_(work)
    return out


def _decodes_into(dtype: torch.dtype, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether the product can be made in ``dtype`` itself, rounded once: both factors are numbers
    of it. (Also so in other cases, where torch would convert one by one.)"""
    whole = weight.dtype == torch.int8 and scale is not None and scale.dtype == dtype
    return dtype == torch.float32 or (dtype == torch.bfloat16 and whole)


def _decode_e4m3(codes: Tensor, bits: Tensor, out: Tensor) -> None:
    """``codes`` (e4m3fn) as fp32, with ``bits`` (int16) in between: torch's way, one by one, takes
    several times as long.

    Sign, exponent and mantissa are moved to where fp16 has them. Its exponent counts from 8 further
    down, subnormals included: what stands there is the number over 256.
    """
    raw = codes.view(torch.int8)
    if int((raw & 127).amax()) == 127:  # NaN; fp16 would read 480 / 256
        out.copy_(codes)
        return
    bits.copy_(raw).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # bit 14: the copied sign
    out.copy_(bits.view(torch.float16)).mul_(256)
