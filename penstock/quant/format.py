"""What a quantised weight is: the `QuantFormat` protocol and the formats by name.

A format's own module says how its bytes lie and counts them; `penstock.quant.values` computes them,
imported when there is a tensor to compute with: a plan needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from penstock.errors import UsageError
from penstock.quant.gguf import GGUF_FORMATS
from penstock.quant.nf4 import NF4
from penstock.quant.plain import Plain
from penstock.quant.quanto import QuantoInt4
from penstock.quant.rows import Shape, Spec
from penstock.quant.scaled import Scaled8

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class QuantFormat(Protocol):
    """How a linear weight ``(out features, in features)`` is stored and read.

    Formats are frozen values. A stored tensor is named by its suffix: what follows the linear's
    name and a dot in a file (``"weight"``, ``"weight_scale"``, ``"weight._data"``).
    """

    @property
    def name(self) -> str:
        """The name in `FORMATS`, in packs, plans and reports."""

    def fits(self, shape: Shape) -> bool:
        """Whether a weight of ``shape`` can be stored; if not it is kept plain."""

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Dtype tag and shape of each stored tensor, without touching any tensor.

        Args:
            shape: of the weight.
            compute_dtype: safetensors tag of the dtype that the model computes in; some formats
                keep their scales in it.
        """

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Most bytes that `dequantise` allocates for a moment beside its output, on a device of the
        type ``device`` ("cpu", "cuda")."""

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Stored tensors of ``weight`` (2-D; bf16, fp16 or fp32); ``name`` is for messages.

        Raises:
            CheckpointError: the weight holds NaN or Inf.
        """

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The weight in ``dtype``, written into ``out`` where it is given (contiguous)."""


def _by_name(*formats: QuantFormat) -> Mapping[str, QuantFormat]:
    return MappingProxyType({each.name: each for each in formats})


FORMATS: Mapping[str, QuantFormat] = _by_name(
    Plain("bf16", "BF16"),
    Plain("fp16", "F16"),
    Plain("fp32", "F32"),
    Scaled8("fp8", "F8_E4M3", "fp8"),
    Scaled8("int8", "I8", "int8"),
    NF4(),
    Scaled8("quanto-int8", "I8", "int8", "column", None, "weight._data", "weight._scale"),
    Scaled8("quanto-fp8", "F8_E4M3", "fp8", "column", None, "weight._data", "weight._scale"),
    QuantoInt4(),
    *GGUF_FORMATS,
)


def writable() -> tuple[str, ...]:
    """Names of the formats that weights can be quantised to; the others are only read."""
    read_only = {each.name for each in GGUF_FORMATS if each.ggml_type != "Q8_0"}
    return tuple(name for name in FORMATS if name not in read_only)


def plain_format(tag: str) -> QuantFormat:
    """The format of weights that are stored in the dtype ``tag``, as they are."""
    return next(fmt for fmt in FORMATS.values() if isinstance(fmt, Plain) and fmt.tag == tag)


def get_format(name: str) -> QuantFormat:
    """The format called ``name``.

    Raises:
        UsageError: no such format; lists those there are.
    """
    if name not in FORMATS:
        raise UsageError(
            "unknown format", expected="one of " + ", ".join(FORMATS), found=repr(name)
        )
    return FORMATS[name]
