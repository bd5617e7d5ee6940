"""The formats that weights are stored in: what each states, and all of them by name.

A format is a frozen value that counts bytes; how it computes is `penstock.quant.arithmetic`'s. What
can be run is here, and what is here can be planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from penstock.errors import ProfileError
from penstock.formats.gguf import GGUF_FORMATS
from penstock.formats.micro import Micro
from penstock.formats.nf4 import NF4
from penstock.formats.plain import Plain
from penstock.formats.quanto import QuantoInt4
from penstock.formats.rows import Shape, Spec
from penstock.formats.scaled import Gemm, Scaled8
from penstock.formats.tags import ITEM_BYTES


class QuantFormat(Protocol):
    """How a linear weight ``(out features, in features)`` is stored.

    A stored tensor is named by its suffix: what follows the linear's name and a dot in a file
    (``"weight"``, ``"weight_scale"``, ``"weight._data"``).
    """

    @property
    def name(self) -> str:
        """The name in `FORMATS`, in packs, plans and reports."""

    @property
    def label(self) -> str:
        """The name for people, who are told of variants: "fp8 per row", "fp8 raw"."""

    @property
    def plain(self) -> bool:
        """Whether the bytes are the values, in a floating-point type that computes."""

    @property
    def writable(self) -> bool:
        """Whether weights can be quantised to it; if not it is only read."""

    @property
    def by_rows(self) -> bool:
        """Whether each row's bytes lie together, so that rows are read and quantised alone."""

    @property
    def gemm(self) -> Gemm | None:
        """The 8-bit matrix product that can use the stored bytes; None: they are decoded."""

    def fits(self, shape: Shape) -> bool:
        """Return whether a weight of ``shape`` can be stored; if not it is kept plain."""

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the weight's shape by that of its data, the first of the stored tensors; None
        where only the model's config tells it."""

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return the dtype tag and shape of each stored tensor.

        Args:
            shape: of the weight.
            compute_dtype: safetensors tag of the dtype that the model computes in; some formats
                keep their scales in it.
        """

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return the most bytes that decoding allocates for a moment beside its output, on a device
        of the type ``device`` ("cpu", "cuda")."""


def _by_name(*formats: QuantFormat) -> Mapping[str, QuantFormat]:
    return MappingProxyType({each.name: each for each in formats})


FORMATS: Mapping[str, QuantFormat] = _by_name(
    Plain("bf16", "BF16"),
    Plain("fp16", "F16"),
    Plain("fp32", "F32"),
    Plain("fp64", "F64"),
    Scaled8("fp8", "F8_E4M3", "fp8"),
    Scaled8("int8", "I8", "int8"),
    Scaled8("fp8-e5m2", "F8_E5M2", None),
    Scaled8("int8-convrot", "I8", "int8", rotation=256),
    NF4(),
    Scaled8("quanto-int8", "I8", "int8", "column", None, "weight._data", "weight._scale"),
    Scaled8("quanto-fp8", "F8_E4M3", "fp8", "column", None, "weight._data", "weight._scale"),
    QuantoInt4(),
    Micro("nvfp4", 16, 16, "F8_E4M3", ()),
    Micro("mxfp8", 32, 32, "F8_E8M0", None),
    *GGUF_FORMATS,
)


def writable() -> tuple[str, ...]:
    """Return the names of the formats that weights can be quantised to; the others are only
    read."""
    return tuple(name for name, each in FORMATS.items() if each.writable)


def plain_format(tag: str) -> QuantFormat:
    """Return the format of weights that are stored in the dtype ``tag``, as they are."""
    return next(each for each in FORMATS.values() if isinstance(each, Plain) and each.tag == tag)


def get_format(name: str) -> QuantFormat:
    """Return the format called ``name``.

    Raises:
        ProfileError: no such format; lists those there are.
    """
    if name not in FORMATS:
        raise ProfileError(
            "unknown format", expected="one of " + ", ".join(FORMATS), found=repr(name)
        )
    return FORMATS[name]


def spec_bytes(spec: Spec) -> int:
    """Return the bytes of one stored tensor."""
    tag, shape = spec
    return ITEM_BYTES[tag] * math.prod(shape)
