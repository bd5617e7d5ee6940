"""From the tensors that a file holds for one weight to the format that reads them.

The spellings and their sources:

- ``weight`` + ``weight_scale``: ComfyUI's `QUANTIZATION.md` (scalar; its `int8_tensorwise` also
  ``[N, 1]``, rotated where ``convrot`` says so), LightX2V (``[N, 1]``), ours;
- ``weight`` + ``scale_weight`` (scalar fp32): ComfyUI's older scaled fp8, Kijai's `_scaled` files;
- ``weight`` alone in F8_E4M3 or F8_E5M2: a raw cast, Kijai's and Comfy-Org's `_fp8_e4m3fn`;
- ``weight._data`` + ``weight._scale`` (+ ``_shift``): optimum-quanto;
- ``_weight_qdata`` + ``_weight_scale``: torchao's int8 and fp8 in folders of diffusers;
- ``weight`` + ``weight_absmax``: ours, of bitsandbytes' NF4; ``weight.absmax`` and others beside a
  flat ``weight``: its own;
- ``weight`` + ``weight_scale`` (+ ``weight_scale_2``) of NVFP4 and MXFP8: ComfyUI's;
- ``weight`` of a ggml type, whose tag says which.

Scales of activations (``input_scale``, ``scale_input``, ``output_scale``) are not used: ours are
measured for each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from penstock.errors import CheckpointError
from penstock.formats.formats import FORMATS, QuantFormat
from penstock.formats.gguf import GGUF_FORMATS
from penstock.formats.gguf import PREFIX as GGUF
from penstock.formats.micro import Micro
from penstock.formats.nf4 import NF4
from penstock.formats.plain import Plain
from penstock.formats.quanto import QuantoInt4
from penstock.formats.rows import Spec
from penstock.formats.scaled import ROTATIONS, Scaled8, ScaleLayout

ZERO_POINT = "_weight_zero_point"
"""torchao's, which computing ignores: the caller looks that it is zero."""

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
"""Text in which bitsandbytes says how a weight is stored."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "scale_weight": "weight_scale",
        "_weight_qdata": "weight",
        "_weight_scale": "weight_scale",
        "weight.absmax": "weight_absmax",
        "weight.nested_absmax": "weight_nested_absmax",
        "weight.nested_quant_map": "weight_nested_map",
    }
)
UNUSED: frozenset[str] = frozenset(
    {"input_scale", "scale_input", "output_scale", "comfy_quant", "weight.quant_map", ZERO_POINT,
     *STATES}
)  # fmt: skip

WHOLE = UNUSED | {"weight_nested_map"}
"""Suffixes of what has no rows: it serves each of the matrices that lie in one."""

_KNOWN = (
    "weight", "weight._data._data", "weight._data", "weight._scale", "weight._shift",
    "weight_scale_2", "weight_scale", "weight_absmax", "weight_nested_absmax", "weight_nested_map",
    "SCB", *ALIASES, *UNUSED,
)  # fmt: skip
_SUFFIX = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _KNOWN))})")
_EIGHT = {"F8_E4M3": "fp8", "I8": "int8", "F8_E5M2": "fp8-e5m2"}
_COMFY = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4", "mxfp8")
_PLAIN: Mapping[str, QuantFormat] = MappingProxyType(
    {each.tag: each for each in FORMATS.values() if isinstance(each, Plain)}
)


def split_suffix(name: str) -> tuple[str, str] | None:
    """Return a stored tensor's layer and its suffix as the file spells it; None if it is none of
    those that formats know."""
    match = _SUFFIX.fullmatch(name)
    return (match[1], match[2]) if match else None


def canonical_suffix(suffix: str) -> str | None:
    """Return the suffix under which formats know a stored tensor; None for one that computing
    ignores."""
    return None if suffix in UNUSED else ALIASES.get(suffix, suffix)


def recognise(
    stored: Mapping[str, Spec],
    *,
    layer: str = "weight",
    comfy: Mapping[str, object] | None = None,
    full_precision: bool = False,
    state: Mapping[str, object] | None = None,
) -> QuantFormat:
    """Return the format of one weight's stored tensors; a plain or raw one may have any dimensions.

    Args:
        stored: dtype tag and shape by suffix, in any spelling; ``bias`` is ignored. GGUF blocks
            have the tag of their type and the weight's shape.
        layer: its name, for messages.
        comfy: its entry in ComfyUI's ``comfy_quant`` or ``_quantization_metadata``, decoded.
        full_precision: the file forbids 8-bit matrix products (``scaled_fp8`` of two elements).
        state: what bitsandbytes says of the weight (`STATES`), decoded.

    Raises:
        CheckpointError: no format reads these tensors.
    """
    named = _canonical(stored, layer)
    config = {} if comfy is None else comfy
    _refuse_foreign(config, layer)
    if state is not None:
        return _by_bitsandbytes(named, state, layer)
    found = _alone(named, layer) or _packed(named) or _eight_bit(named, layer)
    if found is None and "SCB" in named:
        raise CheckpointError(
            f"{layer} is stored in bitsandbytes' 8 bits, which penstock does not read",
            expected="its 4-bit nf4, or int8 of another maker",
            found="int8 with SCB",
            remedy="Use the same model's bf16, fp8 or GGUF file.",
        )
    if found is None:
        raise _unknown(named, layer)
    if config.get("convrot"):
        found = _rotated(found, config, named, layer)
    forbidden = full_precision or config.get("full_precision_matrix_mult")
    return replace(found, gemm=None) if forbidden and isinstance(found, Scaled8) else found


def _canonical(stored: Mapping[str, Spec], layer: str) -> dict[str, Spec]:
    named: dict[str, Spec] = {}
    for suffix, spec in stored.items():
        known = canonical_suffix(suffix)
        if known is None or known == "bias":
            continue
        if known in named:
            raise CheckpointError(
                f"{layer} has one tensor under two names",
                expected=f"one of {known}, {suffix}",
                found="both",
            )
        named[known] = spec
    return named


def _alone(named: Mapping[str, Spec], layer: str) -> QuantFormat | None:
    """Return the format of a weight that one tensor holds."""
    if set(named) != {"weight"}:
        return None
    tag, shape = named["weight"]
    if tag.startswith(GGUF):
        return _gguf(tag, shape, layer)
    if tag in ("F8_E4M3", "F8_E5M2"):
        return _scaled(_EIGHT[tag], "none", "F32")
    return _PLAIN.get(tag)


def _gguf(tag: str, shape: tuple[int, ...], layer: str) -> QuantFormat:
    kind = tag.removeprefix(GGUF)
    found = next((each for each in GGUF_FORMATS if each.ggml_type == kind), None)
    if found is None:
        raise CheckpointError(
            f"{layer} has a GGUF type that penstock does not read",
            expected=", ".join(each.name for each in GGUF_FORMATS),
            found=f"gguf-{kind.lower()}",
            remedy="Take the Q8_0, Q6_K, Q5_K_M or Q4_K_M file of the same model.",
        )
    if shape[-1] % found.block:
        raise _unknown({"weight": (tag, shape)}, layer)
    return found


def _packed(named: Mapping[str, Spec]) -> QuantFormat | None:
    """Return the format of codes smaller than a byte."""
    if set(named) == {"weight._data._data", "weight._scale", "weight._shift"}:
        return QuantoInt4(scale_tag=named["weight._scale"][0])
    tag, shape = named.get("weight", ("", ()))
    if len(shape) != 2:
        return None
    if set(named) == {"weight", "weight_absmax"} and tag == "U8":
        return FORMATS["nf4"]
    return _micro(named, tag)


def _by_bitsandbytes(
    named: Mapping[str, Spec], state: Mapping[str, object], layer: str
) -> QuantFormat:
    """Return flat NF4, its maxima in fp32 or quantised once more."""
    nested, offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
    block, shape = state.get("blocksize"), state.get("shape")
    said = (block, nested, *(shape if isinstance(shape, list) else ()))
    numbers = [n for n in said if isinstance(n, int) and n >= 0]
    whole = len(said) == len(numbers) == 4 and block
    if whole and state.get("quant_type") == "nf4" and isinstance(offset, int | float):
        size, again, rows, columns = numbers
        found = NF4(block=size, flat=True, nested_block=again, nested_offset=float(offset))
        if found.fits((rows, columns)) and found.storage((rows, columns), "") == dict(named):
            return found
    raise CheckpointError(
        f"{layer} is quantised by bitsandbytes in a way that penstock does not read",
        expected="nf4 of matrices whose rows are whole blocks",
        found=f"{state.get('quant_type')} in blocks of {block}, of shape {shape}",
        remedy="Use the same model's bf16, fp8 or GGUF file.",
    )


def _micro(named: Mapping[str, Spec], tag: str) -> QuantFormat | None:
    """NVFP4 or MXFP8, of whole tiles."""
    scale_tag = named.get("weight_scale", ("", ()))[0]
    found: Micro | None = None
    if set(named) == {"weight", "weight_scale", "weight_scale_2"} and tag == "U8":
        found = Micro("nvfp4", 16, 16, scale_tag, named["weight_scale_2"][1])
    elif set(named) == {"weight", "weight_scale"} and scale_tag in ("U8", "F8_E8M0"):
        found = Micro("mxfp8", 32, 32, scale_tag, None)
    if found is None:
        return None
    rows, columns = found.logical(named["weight"][1])
    return found if found.storage((rows, columns), "") == dict(named) else None


def _eight_bit(named: Mapping[str, Spec], layer: str) -> Scaled8 | None:
    for data, scale, prefix in (
        ("weight", "weight_scale", ""),
        ("weight._data", "weight._scale", "quanto-"),
    ):
        tag, shape = named.get(data, ("", ()))
        known = prefix + _EIGHT.get(tag, "") in FORMATS and len(shape) == 2
        if known and set(named) == {data, scale}:
            scale_tag, scale_dims = named[scale]
            layout = _layout(scale_dims, shape[0], layer)
            return _scaled(prefix + _EIGHT[tag], layout, scale_tag)
    return None


def _rotated(
    found: QuantFormat, config: Mapping[str, object], named: Mapping[str, Spec], layer: str
) -> QuantFormat:
    size, columns = config.get("convrot_groupsize", 256), (*named.get("weight", ("", ()))[1], 0)[1]
    legal = isinstance(size, int) and size in ROTATIONS and columns % size == 0
    if not (legal and isinstance(found, Scaled8) and found.name == "int8"):
        raise CheckpointError(
            f"{layer} was rotated (convrot) in a way that penstock does not read",
            expected=f"int8 in groups of {', '.join(map(str, ROTATIONS))} columns",
            found=f"{found.name} of {columns} columns in groups of {size}",
            remedy="Use the same model's fp8, bf16 or GGUF file, or quantise the bf16 file with "
            "`penstock pack --format int8-convrot`",
        )
    assert isinstance(size, int)
    return replace(found, name="int8-convrot", rotation=size)


def _scaled(name: str, layout: ScaleLayout, tag: str | None) -> Scaled8:
    base = FORMATS[name]
    assert isinstance(base, Scaled8)
    return replace(base, scale=layout, scale_tag=tag)


def _layout(dims: tuple[int, ...], rows: int, layer: str) -> ScaleLayout:
    layouts: dict[tuple[int, ...], ScaleLayout] = {
        (rows,): "row",
        (rows, 1): "column",
        (): "scalar",
        (1,): "one",
        (1, 1): "one_one",
    }
    if dims not in layouts:
        raise CheckpointError(
            f"the scale of {layer} has an unknown layout",
            expected=f"shape [], [1], [1, 1], [{rows}] or [{rows}, 1]",
            found=str(list(dims)),
            remedy="Scales by groups or blocks of columns (torchao's 4 bits, block-wise fp8) are "
            "not read; use another file of this model",
        )
    return layouts[dims]


def _refuse_foreign(config: Mapping[str, object], layer: str) -> None:
    kind = config.get("format")
    if kind not in (None, *_COMFY):
        raise CheckpointError(
            f"{layer} has a quantisation that penstock does not read",
            expected=", ".join(_COMFY),
            found=str(kind),
            remedy="Use another file of this model",
        )


def _unknown(named: Mapping[str, Spec], layer: str) -> CheckpointError:
    found = ", ".join(f"{suffix} {tag}{list(dims)}" for suffix, (tag, dims) in named.items())
    return CheckpointError(
        f"{layer} is stored in a way that penstock does not read",
        expected="bf16, fp16, fp32, fp64, fp8, int8 with scales, quanto, nf4, nvfp4, mxfp8 or GGUF",
        found=found or "none",
        remedy="Use the same model's bf16, fp8 e4m3 or GGUF file.",
    )
