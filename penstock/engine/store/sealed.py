"""Documents that notice their own damage: JSON and safetensors with a SHA-256 of all their bytes.

The digest stands at a fixed place near the start of the document and covers everything else, the
safetensors header and its length included. It is checked before anything is parsed. The files
remain plain JSON and plain safetensors for every other program.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from penstock.errors import JournalError

if TYPE_CHECKING:  # a list of jobs is read without torch
    import torch

Document = list[bytes | memoryview]

_DIGEST_CHARS = 64
_BLANK = b"0" * _DIGEST_CHARS
_JSON_HEAD = b'{"digest": "'
_TENSOR_HEAD = b'{"__metadata__":{"digest":"'
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 20
_PIECE_BYTES = 1 << 20
_ALIGNMENT = 8

TENSOR_TYPES = {
    "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.int16": "I16",
    "torch.int32": "I32", "torch.int64": "I64", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float32": "F32", "torch.float64": "F64", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""By the name of torch's dtype."""


def seal_json(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object with the members of ``value`` and a digest before them."""
    body = _text(dict(value))
    tail = b'",\n' + body[1:].lstrip() if value else b'"}'
    return _JSON_HEAD + _digest([_JSON_HEAD, _BLANK, tail]) + tail


def _text(value: dict[str, Any]) -> bytes:
    """JSON that people can read; names that are no text (bytes of another encoding) are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=1, allow_nan=False).encode()


def open_json(blob: bytes) -> dict[str, Any]:
    """Open the members of a document of :func:`seal_json`.

    Raises:
        JournalError: it is damaged.
    """
    _verify(blob, 0, _JSON_HEAD)
    value = _object(blob)
    del value["digest"]
    return value


def seal_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Document:
    """Return a safetensors file as chunks to write; host tensors are not copied.

    Args:
        tensors: of any device and layout; their order is kept.
        metadata: text that stands in the header.
    """
    parts = [raw_bytes(tensor) for tensor in tensors.values()]
    entries: dict[str, Any] = {}
    start = 0
    for (name, tensor), part in zip(tensors.items(), parts, strict=True):
        entries[name] = {
            "dtype": TENSOR_TYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + part.nbytes],
        }
        start += part.nbytes
    tail = _header_tail(entries, metadata)
    length = len(_TENSOR_HEAD) + _DIGEST_CHARS + len(tail)
    head = length.to_bytes(_LENGTH_BYTES, "little") + _TENSOR_HEAD
    return [head, _digest([head, _BLANK, tail, *parts]), tail, *parts]


def open_tensors(blob: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors (on the CPU, their own memory) and metadata of a document of
    :func:`seal_tensors`.

    Raises:
        JournalError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    _verify(blob, _LENGTH_BYTES, _TENSOR_HEAD)
    try:
        tensors = load(blob)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise JournalError("the tensors cannot be read", found=str(error)) from error
    return tensors, read_metadata(blob)


def verified_metadata(file: BinaryIO) -> dict[str, str]:
    """Return the metadata of a document of :func:`seal_tensors` in ``file``, every byte of which is
    checked, piece by piece.

    Raises:
        JournalError: it is damaged, or another document.
        OSError: it cannot be read.
    """
    start = file.read(_LENGTH_BYTES + len(_TENSOR_HEAD))
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    told = file.read(_DIGEST_CHARS)
    if start[_LENGTH_BYTES:] != _TENSOR_HEAD or length > _MAX_HEADER_BYTES:
        raise JournalError("the file is damaged", expected="a sealed document", found="another")
    tail = file.read(length - len(_TENSOR_HEAD) - _DIGEST_CHARS)
    sha = hashlib.sha256()
    for part in (start, _BLANK, tail):
        sha.update(part)
    while piece := file.read(_PIECE_BYTES):
        sha.update(piece)
    if sha.hexdigest().encode() != told:
        raise JournalError("the file is damaged", expected="its own SHA-256", found="another one")
    return read_metadata(start + told + tail)


def read_metadata(blob: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file from its first bytes, unverified: for display.

    Raises:
        JournalError: there is none to be read.
    """
    length = int.from_bytes(blob[:_LENGTH_BYTES], "little")
    metadata = _object(blob[_LENGTH_BYTES : _LENGTH_BYTES + length]).get("__metadata__")
    if not isinstance(metadata, dict):
        raise JournalError("the header is damaged", expected="metadata", found="none")
    metadata.pop("digest", None)
    return {str(key): str(value) for key, value in metadata.items()}


def _header_tail(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    inner = json.dumps(dict(metadata), ensure_ascii=True, separators=(",", ":"))[1:]
    outer = json.dumps(dict(entries), ensure_ascii=True, separators=(",", ":"))[1:]
    tail = f'"{"," if metadata else ""}{inner}{"," if entries else ""}{outer}'.encode()
    used = len(_TENSOR_HEAD) + _DIGEST_CHARS + len(tail)
    return tail + b" " * (-used % _ALIGNMENT)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, row by row; those of a host tensor that lies so are not copied."""
    import torch

    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.to("cpu").contiguous().reshape(-1)
    if flat.stride() != (1,):  # one element of an expanded tensor counts as contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8).numpy().data


def _digest(chunks: Iterable[bytes | memoryview]) -> bytes:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest().encode()


def _verify(blob: bytes, start: int, head: bytes) -> None:
    at = start + len(head)
    end = at + _DIGEST_CHARS
    if len(blob) < end or blob[start:at] != head:
        raise JournalError(
            "the file is damaged", expected="a sealed document", found=f"{len(blob)} other bytes"
        )
    whole = memoryview(blob)
    if _digest([whole[:at], _BLANK, whole[end:]]) != blob[at:end]:
        raise JournalError("the file is damaged", expected="its own SHA-256", found="another one")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object(blob: bytes) -> dict[str, Any]:
    try:
        value = json.loads(blob, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise JournalError("the file is damaged", expected="JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise JournalError(
            "the file is damaged", expected="a JSON object", found=type(value).__name__
        )
    return value
