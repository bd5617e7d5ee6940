"""Headers of safetensors files, read by our own strict parser.

The format is described at https://github.com/huggingface/safetensors: eight bytes of header length
(little endian), a JSON object, then the data. Everything that the library refuses is refused here,
and beyond it duplicate keys, unknown fields, path-like names and types smaller than a byte.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from penstock.errors import HeaderError
from penstock.formats.tags import ITEM_BYTES
from penstock.offload.files import WeightFile

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

MAX_TENSORS = 1 << 16
"""Of a file: fifty times what the largest model has that penstock runs."""

MAX_NAME_CHARACTERS = 1024

_MAX_TOKENS = 4_000_000
"""Quotes and separators of a JSON text: what decides how long it takes to read, and how much
memory. 65,536 tensors have a fifth of them; the rest is for metadata."""

_U64_MAX = (1 << 64) - 1
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_PATH_LIKE = re.compile(r"[\x00-\x1f\x7f\\]|^/|^[A-Za-z]:|(^|/)\.\.?(/|$)")
_SHOWN = 80
_AGAIN = "Download or copy the file again, and compare its size with the source."
_SOUND = (
    "The file may be sound: penstock does not read numbers of that type, so use the same model's "
    "bf16, fp8 or GGUF file."
)


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor of a header; ``start`` and ``end`` are bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their bytes, metadata, first byte of the data."""

    tensors: Mapping[str, HeaderTensor]
    metadata: Mapping[str, str]
    data_start: int


class HeaderFault(ValueError):
    """Why a header (or an index) is refused, before the file's name is known.

    Args:
        remedy: None: that of a damaged file.
    """

    def __init__(self, expected: str, found: object, remedy: str | None = None) -> None:
        self.expected, self.found, self.remedy = expected, found, remedy
        super().__init__(expected)


def read_header(file: WeightFile) -> Header:
    """Read the header of an open safetensors file, checked against the file's size.

    Raises:
        HeaderError: it is damaged, lies about the file, or belongs to something else.
    """
    size = file.stamp.size
    with faults_of(file.path):
        if size < 8:
            raise HeaderFault("8 bytes of header length", f"a file of {size} bytes")
        length = int.from_bytes(_read(file, 0, 8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise HeaderFault(f"a header of 2 to {MAX_HEADER_BYTES:,} bytes", f"{length:,}")
        if 8 + length > size:
            raise HeaderFault(f"a header of {length:,} bytes", f"a file of {size:,} bytes")
        return parse_header(_read(file, 8, length), size)


def parse_header(text: bytes, file_bytes: int) -> Header:
    """Parse a checked header from its JSON ``text``, in a file of ``file_bytes`` bytes in all."""
    table = parse_object(text)
    metadata = _parse_metadata(table.pop(_METADATA, {}))
    if len(table) > MAX_TENSORS:
        raise HeaderFault(f"at most {MAX_TENSORS:,} tensors", f"{len(table):,}")
    tensors = {name: _parse_tensor(name, fields) for name, fields in table.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(ordered, file_bytes - 8 - len(text))
    return Header(MappingProxyType(ordered), MappingProxyType(metadata), 8 + len(text))


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turn a HeaderFault inside into the HeaderError that names ``path``."""
    try:
        yield
    except HeaderFault as fault:
        plain = isinstance(fault.found, str) and fault.found.isprintable()
        shown = str(fault.found) if plain else reprlib.repr(fault.found)
        raise HeaderError(
            f"{path} cannot be used",
            expected=fault.expected,
            found=shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "...",
            remedy=fault.remedy or _AGAIN,
        ) from None


def parse_object(text: bytes, *, fractions: bool = False) -> dict[str, Any]:
    """Parse the JSON object in ``text``: UTF-8, no key twice, no number below zero, no NaN.

    Args:
        fractions: whether numbers may have them.

    Raises:
        HeaderFault: it is none.
    """
    if not text.startswith(b"{"):
        raise HeaderFault("a JSON object", text[:16])
    tokens = sum(text.count(mark) for mark in (b'"', b",", b"[", b"{"))
    if tokens > _MAX_TOKENS:
        raise HeaderFault(f"a JSON object of at most {_MAX_TOKENS:,} tokens", f"{tokens:,}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_parse_int,
            parse_float=float if fractions else _refuse_number,
            parse_constant=_refuse_number,
        )
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise HeaderFault("a JSON object in UTF-8", str(error)) from error
    assert isinstance(value, dict)
    return value


def check_name(name: str) -> None:
    """Raise HeaderFault for names that could lead out of a folder, or that cannot be printed."""
    if len(name) > MAX_NAME_CHARACTERS:
        raise HeaderFault(f"names of at most {MAX_NAME_CHARACTERS} characters", len(name))
    if not name or _PATH_LIKE.search(name) or _has_surrogate(name):
        raise HeaderFault("plain names", name)


def _read(file: WeightFile, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise HeaderFault("every key once", counts.most_common(1)[0][0])
    return table


def _parse_int(digits: str) -> int:
    # "-0" is an integer to Python and none to the library; 20 digits hold every 64-bit number.
    if digits.startswith("-") or len(digits) > 20 or int(digits) > _U64_MAX:
        raise HeaderFault("whole numbers from 0 to 2^64 - 1", digits)
    return int(digits)


def _refuse_number(text: str) -> Any:
    raise HeaderFault("whole numbers only", text)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _parse_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise HeaderFault("metadata as an object", value)
    for key, text in value.items():
        if not isinstance(text, str) or _has_surrogate(key) or _has_surrogate(text):
            raise HeaderFault("metadata of text by text", {key: text})
    return value


def _parse_tensor(name: str, fields: Any) -> HeaderTensor:
    check_name(name)
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        raise HeaderFault(f"{name} with dtype, shape and data_offsets", fields)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        remedy = _SOUND if isinstance(dtype, str) else None
        raise HeaderFault(f"{name} of a known type of whole bytes", dtype, remedy)
    if not _whole_numbers(shape):
        raise HeaderFault(f"{name} with a shape of whole numbers", shape)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderFault(f"{name} with a start and an end not before it", offsets)
    need = _extent(name, shape, ITEM_BYTES[dtype])
    if offsets[1] - offsets[0] != need:
        raise HeaderFault(
            f"{name} in {need:,} bytes ({dtype} {shape})", f"{offsets[1] - offsets[0]:,}"
        )
    return HeaderTensor(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _extent(name: str, shape: list[int], item_bytes: int) -> int:
    nbytes = 1
    for size in (*shape, item_bytes):
        nbytes *= size
        if nbytes > _U64_MAX:
            raise HeaderFault(f"{name} of less than 2^64 bytes", shape)
    return nbytes


def _check_cover(ordered: Mapping[str, HeaderTensor], data_bytes: int) -> None:
    position = 0
    for name, tensor in ordered.items():
        if tensor.start != position:
            raise HeaderFault(
                f"{name} to start at byte {position:,} of the data", f"{tensor.start:,}"
            )
        position = tensor.end
    if position != data_bytes:
        raise HeaderFault(f"{position:,} bytes of data", f"{data_bytes:,}")
