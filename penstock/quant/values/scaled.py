"""The arithmetic of `penstock.formats.scaled`: eight bits a weight and a scale a row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.formats.rows import Shape, chunk_rows, row_slices
from penstock.formats.scaled import E4M3_MAX, INT8_MAX, Scaled8, ScaleLayout, scale_shape
from penstock.quant.values.quanto import codes_of
from penstock.quant.values.rotation import unit_rotation
from penstock.quant.values.tensors import DTYPES, output, row_amax


def quantise(fmt: Scaled8, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Return ``weight / scale``, rounded to nearest even."""
    amax = row_amax(weight, name)
    scale = _fresh_scale(fmt, _rotated_amax(fmt, weight) if fmt.rotation else amax, weight.dtype)
    stored = torch.empty_like(weight, dtype=DTYPES[fmt.tag])
    for rows in row_slices(weight.shape[0], weight.shape[1], weight.device.type):
        part = weight[rows].to(torch.float32, copy=True)
        if fmt.rotation:
            part = unit_rotation(part, fmt.rotation).mul_(fmt.rotation**-0.5)
        unit = scale[rows] if scale is not None and len(scale) == len(weight) else scale
        if unit is not None and fmt.is_quanto:
            stored[rows] = codes_of(part, unit.float(), stored.dtype)
        else:
            stored[rows] = _round(part if unit is None else part.div_(unit), fmt.tag)
    if scale is None:
        return {fmt.weight_key: stored}
    return {
        fmt.weight_key: stored,
        fmt.scale_key: scale_as(scale, fmt.scale, len(weight), fmt.scale_tag),
    }


def _rotated_amax(fmt: Scaled8, weight: Tensor) -> Tensor:
    """Return the largest magnitude of each row once it is rotated: fp32, ``(rows, 1)``."""
    amax = torch.empty(len(weight), 1, device=weight.device)
    for rows in row_slices(weight.shape[0], weight.shape[1], weight.device.type):
        part = unit_rotation(weight[rows].float().contiguous(), fmt.rotation)
        torch.amax(part.abs_(), dim=1, keepdim=True, out=amax[rows])
    return amax.mul_(fmt.rotation**-0.5)


def _fresh_scale(fmt: Scaled8, amax: Tensor, dtype: torch.dtype) -> Tensor | None:
    if fmt.scale == "none":
        return None
    whole = fmt.scale in ("scalar", "one", "one_one")
    largest = E4M3_MAX if fmt.tag == "F8_E4M3" else INT8_MAX
    scale = (amax.max().reshape(1, 1) if whole else amax) / largest
    stored = scale.to(dtype if fmt.scale_tag is None else DTYPES[fmt.scale_tag])
    info = torch.finfo(stored.dtype)
    # Never 0: not for rows of zeros, and not where fp16 underflows (rows below 1e-5).
    return stored.clamp_(min=info.tiny * info.eps)


def operands(fmt: Scaled8, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the 8-bit weight ``(rows, columns)`` and its scale, ``(rows, 1)`` or ``(1, 1)``."""
    weight = tensors[fmt.weight_key]
    return weight, None if fmt.scale == "none" else tensors[fmt.scale_key].reshape(-1, 1)


def dequantise(
    fmt: Scaled8,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``stored * scale``, computed in fp32 and rounded once to ``dtype``."""
    weight, scale = operands(fmt, tensors)
    out = output(out, shape, dtype, weight.device)
    if fmt.rotation:
        return _unrotated(weight, scale, fmt.rotation, out)
    if weight.device.type == "cpu":
        return _by_chunks(weight, scale, out)
    return _at_once(weight, scale, out)


def _at_once(weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """For devices that cast inside their kernels: nothing is made but the scale in fp32."""
    if scale is not None and weight.dtype == torch.int8:
        # Promoted to fp32 and rounded into ``out`` in one pass over memory; fp8 is not promoted.
        return torch.mul(weight, scale.float(), out=out)
    # Both stored types are exact in every compute dtype: one rounding here as well.
    return out.copy_(weight) if scale is None else out.copy_(weight).mul_(scale.float())


def _round(part: Tensor, tag: str) -> Tensor:
    if tag == "I8":
        return part.round_().clamp_(-INT8_MAX, INT8_MAX)
    # Older torch makes NaN of what e4m3fn cannot hold; newer saturates.
    return part.clamp_(-E4M3_MAX, E4M3_MAX)


def scale_as(scale: Tensor, layout: ScaleLayout, rows: int, tag: str | None) -> Tensor:
    """Return ``scale`` in the shape that ``layout`` names."""
    dtype = scale.dtype if tag is None else DTYPES[tag]
    return scale.to(dtype).reshape(scale_shape(layout, rows))


def _by_chunks(weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Walk the rows so that what is in work stays in the cache; bit-equal to the whole product."""
    rows, columns = weight.shape
    size = chunk_rows(rows, columns, weight.device.type)
    bits = torch.empty(size, columns, dtype=torch.int16) if weight.is_floating_point() else None
    chunk = None if _decodes_into(out.dtype, weight, scale) else torch.empty(size, columns)
    if scale is not None:
        scale = scale.to(out.dtype if chunk is None else torch.float32).expand(rows, 1)
    if bits is None and chunk is None:
        columns //= 4  # nothing lies in between: the calls cost more than the cache gives
    for part in row_slices(rows, columns, weight.device.type):
        target = out[part]
        work = target if chunk is None else chunk[: len(target)]
        if bits is None:
            work.copy_(weight[part])
        else:
            decode = decode_e4m3 if weight.dtype == torch.float8_e4m3fn else _decode_e5m2
            decode(weight[part], bits[: len(target)], work)
        if scale is not None:
            work.mul_(scale[part])
        if chunk is not None:
            target.copy_(work)
    return out


def _unrotated(weight: Tensor, scale: Tensor | None, size: int, out: Tensor) -> Tensor:
    """Rotates the codes, whose sums are exact, and scales after: rounded in fp32 once, and to the
    dtype of ``out``."""
    rows, columns = weight.shape
    assert scale is not None
    factor = (scale.float() * size**-0.5).expand(rows, 1)
    device, wide = weight.device.type, 2 * columns  # half a chunk: turning takes two more
    chunk = torch.empty(chunk_rows(rows, wide, device), columns, device=out.device)
    for part in row_slices(rows, wide, device):
        work = chunk[: part.stop - part.start]
        out[part] = unit_rotation(work.copy_(weight[part]), size).mul_(factor[part])
    return out


def _decodes_into(dtype: torch.dtype, weight: Tensor, scale: Tensor | None) -> bool:
    """Return whether the product can be made in ``dtype`` itself, rounded once: both factors are
    numbers of it. (Also so in other cases, where torch would convert one by one.)"""
    whole = weight.dtype == torch.int8 and scale is not None and scale.dtype == dtype
    return dtype == torch.float32 or (dtype == torch.bfloat16 and whole)


def decode_e4m3(codes: Tensor, bits: Tensor, out: Tensor) -> None:
    """``codes`` (e4m3fn) as fp32, with ``bits`` (int16) in between: torch's way, one by one, takes
    several times as long.

    Sign, exponent and mantissa are moved to where fp16 has them. Its exponent counts from 8 further
    down, subnormals included: what stands there is the number over 256.
    """
    raw = codes.view(torch.int8)
    if int((raw & 127).amax()) == 127:  # NaN; fp16 would read 480 / 256
        out.copy_(codes)
        return
    # Sign-extended to 16 bits first, so the sign lands in bit 15 by itself; bit 14 is its copy.
    bits.copy_(raw).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # bit 14: the copied sign
    out.copy_(bits.view(torch.float16)).mul_(256)


def _decode_e5m2(codes: Tensor, bits: Tensor, out: Tensor) -> None:
    """``codes`` (e5m2) as fp32, with ``bits`` in between: they are the upper bytes of fp16."""
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(8)
    out.copy_(bits.view(torch.float16))
