"""The header of a GGUF file: metadata and the places of its tensors. The data is never read.

Source: the GGUF specification (ggml, ``docs/gguf.md``), versions 2 and 3, little-endian. A file is
hostile until checked: every count and length is compared with the bytes that the file has before
anything of that size is read or made, and every tensor must lie inside the file, apart from others.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from penstock.errors import HeaderError
from penstock.formats.gguf import GGML_TYPES
from penstock.offload.checkpoint import TensorEntry
from penstock.offload.files import FileStamp
from penstock.offload.header import MAX_TENSORS
from penstock.regular import open_regular
from penstock.units import align_up

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Metadata key (followed by a tensor's name) of the shape it had before it was stored flat.
Source: ComfyUI-GGUF's converter."""

MAX_HEADER_BYTES = 100_000_000
MAX_INLINE_ITEMS = 4096
MAX_ITEMS = 1 << 21
"""Metadata pairs, strings of arrays and items of short arrays, all together: they are visited one
by one. A tokenizer of 256,000 pieces has a quarter of them."""

_MAX_DIMS = 8
_MAX_NAME_BYTES = 1024
_SHOWN = 200

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class LongArray:
    """A metadata array that was too long to keep: what it holds and where its first item lies.

    Attributes:
        item_type: GGUF's number of the item type (8 is a string).
        count: items.
        offset: of the first item in the file.
    """

    item_type: int
    count: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        version: 2 or 3.
        metadata: scalars, strings, and arrays as tuples (long ones as `LongArray`).
        entries: tensors by name; shapes are the logical ones, slowest dimension first.
        stamp: what the file was when it was read.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    stamp: FileStamp

    @property
    def architecture(self) -> str:
        """``general.architecture``, or an empty string."""
        return str(self.metadata.get("general.architecture", ""))


def is_gguf(path: Path) -> bool:
    """Return whether the file begins as a GGUF file does."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of the GGUF file ``path``.

    Raises:
        HeaderError: no GGUF file, another version or byte order, or a header that is damaged or
            lies about the file.
    """
    with open_regular(path, 1 << 20) as file:
        cursor = _Cursor(file, path)
        version = _version(cursor)
        tensor_count, pair_count = cursor.counts("QQ", (24, 13))
        if tensor_count > MAX_TENSORS:
            raise cursor.error(f"{tensor_count:,} tensors", expected=f"at most {MAX_TENSORS:,}")
        cursor.spend(pair_count, "pairs of metadata")
        metadata = _metadata(cursor, pair_count)
        infos = [_tensor_info(cursor) for _ in range(tensor_count)]
        start = align_up(cursor.position, _alignment(cursor, metadata))
    entries = _entries(cursor, infos, start, metadata)
    return GgufHeader(
        path, version, MappingProxyType(metadata), MappingProxyType(entries), cursor.stamp
    )


class _Cursor:
    """Reads forward through the header and never past the file or the header's limit."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.stamp = FileStamp.of(os.fstat(file.fileno()))
        self.path, self.size, self.position = path, self.stamp.size, 0
        self._file, self._end = file, min(self.size, MAX_HEADER_BYTES)
        self._items = MAX_ITEMS

    def spend(self, count: int, what: str) -> None:
        """Take ``count`` of the items that a header may have."""
        if count > self._items:
            raise self.error(f"{count:,} {what}", expected=f"at most {MAX_ITEMS:,} items in all")
        self._items -= count

    def take(self, nbytes: int, what: str) -> bytes:
        self._room(nbytes, what)
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise self.error(f"its end inside {what}", expected=f"{nbytes} bytes more")
        self.position += nbytes
        return data

    def skip(self, nbytes: int, what: str) -> None:
        self._room(nbytes, what)
        self._file.seek(nbytes, 1)
        self.position += nbytes

    def _room(self, nbytes: int, what: str) -> None:
        if nbytes > self._end - self.position:
            raise self.error(
                f"{nbytes:,} bytes for {what}",
                expected=f"at most {self._end - self.position:,} (file and header limit)",
            )

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what))

    def counts(self, layout: str, item_bytes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of items, each at least so many bytes long: no more than the file can
        hold."""
        values = self.unpack(layout, "a count")
        for value, least in zip(values, item_bytes, strict=True):
            self._room(value * least, f"{value:,} items")
        return values

    def string(self, what: str, limit: int | None = None) -> str:
        (length,) = self.counts("Q", (1,))
        if limit is not None and length > limit:
            raise self.error(f"{length:,} bytes for {what}", expected=f"at most {limit}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: {error.reason}", expected="UTF-8") from error

    def error(self, found: str, *, expected: str) -> HeaderError:
        return HeaderError(
            f"{self.path} has a damaged GGUF header",
            expected=expected,
            found=found if len(found) <= _SHOWN else found[:_SHOWN] + "...",
            remedy="The file is incomplete or was changed: download it again.",
        )


def _version(cursor: _Cursor) -> int:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise HeaderError(
            f"{cursor.path} is not a GGUF file", expected=repr(MAGIC), found=repr(magic)
        )
    (version,) = cursor.unpack("I", "the version")
    if version not in (2, 3):
        raise HeaderError(
            f"{cursor.path} cannot be read",
            expected="GGUF version 2 or 3, little-endian",
            found=f"version {version}",
            remedy="Convert the file with a current llama.cpp or ComfyUI-GGUF.",
        )
    return int(version)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string("a metadata key", 65535)
        if key in metadata:
            raise cursor.error(f"{key!r} twice", expected="unique metadata keys")
        (kind,) = cursor.unpack("I", key)
        metadata[key] = _array(cursor, key) if kind == _ARRAY else _value(cursor, kind, key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind not in _SCALARS:
        raise cursor.error(f"type {kind} of {key!r}", expected="a metadata type from 0 to 12")
    if _SCALARS[kind] == "?":
        (byte,) = cursor.take(1, key)
        if byte > 1:
            raise cursor.error(f"{byte} for {key!r}", expected="0 or 1")
        return bool(byte)
    return cursor.unpack(_SCALARS[kind], key)[0]


def _array(cursor: _Cursor, key: str) -> tuple[Any, ...] | LongArray:
    (kind,) = cursor.unpack("I", key)
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.error(f"an array of type {kind} in {key!r}", expected="scalars or strings")
    item_bytes = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
    (count,) = cursor.counts("Q", (item_bytes,))
    if kind == _STRING or count <= MAX_INLINE_ITEMS:
        cursor.spend(count, f"items of {key!r:.80}")
    if count <= MAX_INLINE_ITEMS:
        return tuple(_value(cursor, kind, key) for _ in range(count))
    array = LongArray(kind, count, cursor.position)
    if kind != _STRING:
        cursor.skip(count * item_bytes, key)
        return array
    for _ in range(count):
        (length,) = cursor.counts("Q", (1,))
        cursor.skip(length, key)
    return array


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor_info(cursor: _Cursor) -> _Info:
    name = cursor.string("a tensor's name", _MAX_NAME_BYTES)
    if not name or "\0" in name:
        raise cursor.error(f"the name {name!r}", expected="a tensor's name")
    (dims,) = cursor.unpack("I", name)
    if dims > _MAX_DIMS:
        raise cursor.error(f"{dims} dimensions of {name!r}", expected=f"at most {_MAX_DIMS}")
    shape = cursor.unpack("Q" * dims, name)
    kind, offset = cursor.unpack("IQ", name)
    return _Info(name, tuple(reversed(shape)), kind, offset)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise cursor.error(
            f"general.alignment {value!r}", expected="a power of two from 8 to 1,048,576"
        )
    return value


def _entries(
    cursor: _Cursor, infos: list[_Info], start: int, metadata: Mapping[str, Any]
) -> dict[str, TensorEntry]:
    alignment = _alignment(cursor, metadata)
    entries: dict[str, TensorEntry] = {}
    for info in infos:
        if info.name in entries:
            raise cursor.error(f"{info.name!r} twice", expected="unique tensor names")
        if info.offset % alignment:
            raise cursor.error(
                f"offset {info.offset} of {info.name!r}", expected=f"a multiple of {alignment}"
            )
        entries[info.name] = _entry(cursor, info, start, metadata)
    _check_apart(cursor, entries)
    return entries


def _entry(cursor: _Cursor, info: _Info, start: int, metadata: Mapping[str, Any]) -> TensorEntry:
    if info.kind not in GGML_TYPES:
        raise HeaderError(
            f"{cursor.path} holds weights of a type that penstock does not know",
            expected="a ggml type up to NVFP4 (40)",
            found=f"type {info.kind} of {info.name!r}",
            remedy="The file may be newer than penstock: take the Q8_0, Q6_K or Q4_K_M file of the "
            "same model.",
        )
    tag, block, block_bytes = GGML_TYPES[info.kind]
    elements = math.prod(info.shape)
    row = info.shape[-1] if info.shape else 1
    if row % block:
        raise cursor.error(
            f"rows of {row} in {info.name!r}", expected=f"a multiple of {block} ({tag})"
        )
    nbytes = elements // block * block_bytes
    if start + info.offset + nbytes > cursor.size:
        raise cursor.error(
            f"{info.name!r} up to byte {start + info.offset + nbytes:,}",
            expected=f"a file of that size (it has {cursor.size:,} bytes)",
        )
    shape = _original_shape(cursor, info, elements, metadata)
    return TensorEntry(
        info.name, cursor.path, start + info.offset, tag, shape, nbytes, cursor.stamp
    )


def _original_shape(
    cursor: _Cursor, info: _Info, elements: int, metadata: Mapping[str, Any]
) -> tuple[int, ...]:
    shape = metadata.get(ORIGINAL_SHAPE + info.name)
    if shape is None:
        return info.shape
    whole = (
        isinstance(shape, tuple)
        and len(shape) <= _MAX_DIMS
        and all(type(n) is int and n >= 0 for n in shape)
    )
    if not whole or math.prod(shape) != elements:
        raise cursor.error(
            f"original shape {shape!r:.80} of {info.name!r}", expected=f"{elements} elements"
        )
    return tuple(shape)


def _check_apart(cursor: _Cursor, entries: Mapping[str, TensorEntry]) -> None:
    placed = sorted((e for e in entries.values() if e.nbytes), key=lambda entry: entry.offset)
    for first, second in pairwise(placed):
        if first.offset + first.nbytes > second.offset:
            raise cursor.error(
                f"{first.name!r} and {second.name!r} overlap", expected="tensors apart"
            )
