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
        """The scale in fp32, and on a CPU a chunk in fp32; other devices decode in place."""
        chunk = shape[1] * chunk_rows(*shape, device) if device.type == "cpu" else 0
        return 4 * (shape[0] + chunk)

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
        if scale is None:
            return out.copy_(weight)
        if weight.device.type != "cpu":
            # Both stored types are exact in every compute dtype: one rounding here as well.
            return out.copy_(weight).mul_(scale.float())
        return _multiply_by_chunks(weight, scale.float().expand(shape[0], 1), out)


def _round(part: Tensor, tag: str) -> Tensor:
    if tag == "I8":
        return part.round_().clamp_(-INT8_MAX, INT8_MAX)
    # Older torch makes NaN of what e4m3fn cannot hold; newer saturates.
    return part.clamp_(-E4M3_MAX, E4M3_MAX)


def scale_as(scale: Tensor, layout: ScaleLayout, rows: int, tag: str | None) -> Tensor:
    """``scale`` in the shape that ``layout`` names."""
    dtype = scale.dtype if tag is None else DTYPES[tag]
    return scale.to(dtype).reshape(scale_shape(layout, rows))


def _multiply_by_chunks(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Walks the rows so that the fp32 chunk stays in the cache; bit-equal to the whole product."""
    rows, columns = weight.shape
    direct = out.dtype == torch.float32
    size = chunk_rows(rows, columns, weight.device)
    chunk = None if direct else torch.empty(size, columns, dtype=torch.float32)
    for part in row_slices(rows, columns, weight.device):
        target = out[part]
        work = target if chunk is None else chunk[: len(target)]
        work.copy_(weight[part]).mul_(scale[part])
        if chunk is not None:
            target.copy_(work)
    return out
