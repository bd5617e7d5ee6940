"""Types of elements by the tags that a safetensors header spells them with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_TYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "I16": (2, "int16"), "U16": (2, "uint16"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "I32": (4, "int32"), "U32": (4, "uint32"), "F32": (4, "float32"),
    "I64": (8, "int64"), "U64": (8, "uint64"), "F64": (8, "float64"), "C64": (8, "complex64"),
}  # fmt: skip

ITEM_BYTES: Mapping[str, int] = MappingProxyType({tag: size for tag, (size, _) in _TYPES.items()})
"""Bytes of one element; types smaller than a byte are left out on purpose."""

TORCH_NAMES: Mapping[str, str] = MappingProxyType({tag: name for tag, (_, name) in _TYPES.items()})
"""What torch calls the type."""
