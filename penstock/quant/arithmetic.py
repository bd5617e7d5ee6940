"""What formats compute: the one map from a kind of format to its arithmetic.

The formats themselves are `penstock.formats`, which no torch is needed for; their arithmetic is in
`penstock.quant.values`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.errors import UsageError
from penstock.formats.formats import QuantFormat, writable
from penstock.formats.gguf import Gguf
from penstock.formats.micro import Micro
from penstock.formats.nf4 import NF4
from penstock.formats.patched import Patched
from penstock.formats.plain import Plain
from penstock.formats.quanto import QuantoInt4
from penstock.formats.rows import Shape
from penstock.formats.scaled import Scaled8
from penstock.quant.values import gguf, micro, nf4, patch, plain, quanto, scaled
from penstock.quant.values.tensors import output


class Arithmetic(NamedTuple):
    """How one kind of format computes; both take the format first, then as the functions below. A
    kind that is only read has no way to be written."""

    quantise: Callable[[Any, Tensor, str], dict[str, Tensor]] | None
    dequantise: Callable[..., Tensor]


def _patched(
    fmt: Patched,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the base's values, changed in fp32 and rounded to ``dtype`` once a LoRA."""
    device = next(iter(tensors.values())).device
    weight = dequantise(fmt.base, tensors, shape, dtype, output(out, shape, dtype, device))
    for each in fmt.patches:
        patch.apply(each, weight, {role: tensors[each.name(role)] for role in each.roles})
    return weight


ARITHMETIC: Mapping[type[Any], Arithmetic] = MappingProxyType(
    {
        Plain: Arithmetic(plain.quantise, plain.dequantise),
        Scaled8: Arithmetic(scaled.quantise, scaled.dequantise),
        NF4: Arithmetic(nf4.quantise, nf4.dequantise),
        Micro: Arithmetic(None, micro.dequantise),
        QuantoInt4: Arithmetic(quanto.quantise, quanto.dequantise),
        Gguf: Arithmetic(gguf.quantise, gguf.dequantise),
        Patched: Arithmetic(None, _patched),
    }
)


def quantise(fmt: QuantFormat, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Quantise ``weight`` to its stored tensors (2-D; bf16, fp16 or fp32); ``name`` is for
    messages.

    Raises:
        CheckpointError: the weight holds NaN, Inf or what the format cannot hold.
        UsageError: the format is only read.
        ValueError: it cannot store that shape.
    """
    made_by = ARITHMETIC[type(fmt)].quantise
    if made_by is None or not fmt.writable:
        raise UsageError(
            f"{fmt.name} is read, not written",
            expected="another format to quantise to: " + ", ".join(writable()),
            found=fmt.name,
        )
    return made_by(fmt, weight, name)


def dequantise(
    fmt: QuantFormat,
    tensors: Mapping[str, Tensor],
    shape: Shape,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight in ``dtype``, written into ``out`` where it is given (contiguous).

    Without ``out`` a plain weight that has ``dtype`` already is given itself.
    """
    return ARITHMETIC[type(fmt)].dequantise(fmt, tensors, shape, dtype, out)
