"""The safetensors header, read and checked by ourselves: the file is hostile until every byte adds up.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON object, data).
We refuse all that the library refuses, and what it lets pass: duplicate keys, unknown fields, names
that look like paths, metadata that is not text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from penstock.errors import HeaderError, PickleRefused

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARS = 1024
MAX_DIMS = 16

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pth", ".pt", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        offset: bytes from the start of the file.
        dtype: safetensors' tag, such as "BF16".
    """

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of the file, and the metadata."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def refuse_pickle(path: Path) -> None:
    """Refuse a file that a pickle reader would open, by its name or its first bytes.

    Raises:
        PickleRefused: with the way to convert it.
    """
    with path.open("rb") as file:
        start = file.read(4)
    by_content = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if by_content or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise PickleRefused(
            f"{path} is a pickle, which can run any code when it is opened",
            expected="a .safetensors file",
            found="a zip or pickle" if by_content else f"a {path.suffix} file",
            remedy="Download the model as .safetensors, or convert it once on a machine you do not "
            "mind losing: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)",
        )


def read_header(path: Path) -> Header:
    """Read and check the header of a .safetensors file; no data is read.

    Raises:
        HeaderError: it is damaged, lies about the file, or belongs to something else.
        PickleRefused: the file is a pickle.
    """
    try:
        refuse_pickle(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text, start = _header_text(path, file, size)
    except OSError as error:
        raise HeaderError(f"{path} cannot be read", found=str(error.strerror)) from error
    fields = _parse(path, text)
    metadata = _metadata(path, fields.pop("__metadata__", {}))
    entries = [_entry(path, name, value, start) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(path, entries, start, size)
    return Header(tuple(entries), metadata)


def _bad(
    path: Path, what: str, expected: str | None = None, found: str | None = None
) -> HeaderError:
    return HeaderError(
        f"{path} is not a sound safetensors file: {what}",
        expected=expected,
        found=found,
        remedy="The file is damaged or cut short: copy or download it again",
    )


def _header_text(path: Path, file: BinaryIO, size: int) -> tuple[bytes, int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _bad(path, "it is too short", "8 bytes or more", f"{size}")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise _bad(
            path, "the header's length is impossible",
            f"2 to {max(2, min(MAX_HEADER_BYTES, size - 8)):,} bytes", f"{length:,}",
        )  # fmt: skip
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise _bad(path, "the header is no JSON object")
    return text, 8 + length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _bad(path, "a key stands twice in the header", found=repr(key)[:80])
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_nan)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "the header is no JSON", found=str(error)[:120]) from error
    if not isinstance(value, dict):
        raise _bad(path, "the header is no JSON object")
    return value


def _no_nan(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _bad(path, "the metadata is not text by name")
    return value


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    _check_name(path, name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _bad(path, f"{name!r} has an unknown dtype", found=repr(dtype)[:40])
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise _bad(path, f"{name!r} has no legal shape", found=repr(shape)[:80])
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _bad(path, f"{name!r} has no legal offsets", found=repr(offsets)[:80])
    nbytes = ITEM_BITS[dtype] // 8
    for size in shape:
        nbytes *= size
    if nbytes != offsets[1] - offsets[0]:
        raise _bad(
            path, f"{name!r} lies about its size", f"{nbytes:,} bytes by shape and dtype",
            f"{offsets[1] - offsets[0]:,}",
        )  # fmt: skip
    return TensorEntry(name, path, start + offsets[0], dtype, tuple(shape), nbytes)


def _check_name(path: Path, name: str) -> None:
    path_like = name.startswith(("/", "\\", "~")) or ".." in name or "\\" in name
    if not name or len(name) > MAX_NAME_CHARS or path_like or not name.isprintable():
        raise _bad(path, "a tensor has a name no model uses", found=repr(name)[:80])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_cover(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    at = start
    for entry in entries:
        if entry.offset != at:
            raise _bad(
                path, f"{entry.name!r} does not begin where the tensor before it ends",
                f"byte {at:,}", f"{entry.offset:,}",
            )  # fmt: skip
        at += entry.nbytes
    if at != size:
        raise _bad(path, "the tensors do not fill the file", f"{at:,} bytes", f"{size:,}")
