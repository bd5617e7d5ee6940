"""From the tensors that a file holds for one linear to the format that reads them.

The spellings and their sources:

- ``weight`` + ``weight_scale``: ComfyUI's `QUANTIZATION.md` (scalar; its `int8_tensorwise` also
  ``[N, 1]``), LightX2V (``[N, 1]``), ours;
- ``weight`` + ``scale_weight`` (scalar fp32): ComfyUI's older scaled fp8, Kijai's `_scaled` files;
- ``weight`` alone in F8_E4M3: a raw cast, Kijai's and Comfy-Org's `_fp8_e4m3fn`;
- ``weight._data`` + ``weight._scale`` (+ ``_shift``): optimum-quanto.

Scales of activations (``input_scale``, ``scale_input``, ``output_scale``) are not used: ours are
measured for each token. GGUF types and NF4 are not told by dtype and shape: the caller names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from penstock.errors import CheckpointError
from penstock.quant.format import FORMATS, QuantFormat
from penstock.quant.quanto import QuantoInt4
from penstock.quant.rows import Spec
from penstock.quant.scaled import Scaled8, ScaleLayout

ALIASES: Mapping[str, str] = MappingProxyType({"scale_weight": "weight_scale"})
UNUSED: frozenset[str] = frozenset({"input_scale", "scale_input", "output_scale", "comfy_quant"})

_PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_EIGHT = {"F8_E4M3": "fp8", "I8": "int8"}


def canonical_suffix(suffix: str) -> str | None:
    """The suffix under which formats know a stored tensor; None for one that computing ignores."""
    return None if suffix in UNUSED else ALIASES.get(suffix, suffix)


def recognise(
    stored: Mapping[str, Spec],
    *,
    layer: str = "weight",
    comfy: Mapping[str, object] | None = None,
    full_precision: bool = False,
) -> QuantFormat:
    """The format of one linear's stored tensors.

    Args:
        stored: dtype tag and shape by suffix, in any spelling; ``bias`` is ignored.
        layer: the linear's name, for messages.
        comfy: its entry in ComfyUI's ``comfy_quant`` or ``_quantization_metadata``, decoded.
        full_precision: the file forbids 8-bit matrix products (``scaled_fp8`` of two elements).

    Raises:
        CheckpointError: no format reads these tensors.
    """
    named = _canonical(stored, layer)
    config = {} if comfy is None else comfy
    _refuse_foreign(config, layer)
    kinds = {suffix: tag for suffix, (tag, _) in named.items()}
    if set(kinds) == {"weight"} and kinds["weight"] in _PLAIN:
        return FORMATS[_PLAIN[kinds["weight"]]]
    if set(kinds) == {"weight._data._data", "weight._scale", "weight._shift"}:
        return QuantoInt4(scale_tag=kinds["weight._scale"])
    found = _eight_bit(named, layer)
    if found is None:
        raise _unknown(named, layer)
    if full_precision or config.get("full_precision_matrix_mult"):
        return replace(found, gemm=None)
    return found


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


def _eight_bit(named: Mapping[str, Spec], layer: str) -> Scaled8 | None:
    for data, scale, prefix in (
        ("weight", "weight_scale", ""),
        ("weight._data", "weight._scale", "quanto-"),
    ):
        tag, shape = named.get(data, ("", ()))
        if tag not in _EIGHT or len(shape) != 2 or not set(named) <= {data, scale}:
            continue
        base = FORMATS[prefix + _EIGHT[tag]]
        assert isinstance(base, Scaled8)
        if scale in named:
            scale_tag, scale_dims = named[scale]
            layout = _layout(scale_dims, shape[0], layer)
            return replace(base, scale=layout, scale_tag=scale_tag)
        if base.name == "fp8":
            return replace(base, scale="none")
    return None


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
            remedy="Scales by blocks of columns are not supported; use another file of this model",
        )
    return layouts[dims]


def _refuse_foreign(config: Mapping[str, object], layer: str) -> None:
    kind = config.get("format")
    if config.get("convrot"):
        raise CheckpointError(
            f"{layer} was quantised after a rotation (convrot)",
            expected="int8_tensorwise without convrot",
            found=f"{kind} with convrot",
            remedy="Use the same model's fp8, bf16 or GGUF file, or quantise the bf16 file with "
            "`penstock pack --format int8`",
        )
    if kind not in (None, "float8_e4m3fn", "int8_tensorwise"):
        raise CheckpointError(
            f"{layer} has a quantisation that penstock does not read",
            expected="float8_e4m3fn or int8_tensorwise",
            found=str(kind),
            remedy="Use another file of this model",
        )


def _unknown(named: Mapping[str, Spec], layer: str) -> CheckpointError:
    found = ", ".join(f"{suffix} {tag}{list(dims)}" for suffix, (tag, dims) in named.items())
    return CheckpointError(
        f"the tensors of {layer} are of no known format",
        expected="weight in BF16, F16, F32, F8_E4M3 or I8 with its scale, or optimum-quanto's",
        found=found or "none",
        remedy="Run `penstock inspect` on the file",
    )
