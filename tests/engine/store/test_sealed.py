"""Sealed documents are plain JSON and plain safetensors, and give back what went in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load

from penstock.engine.store.sealed import (
    open_json,
    open_tensors,
    read_metadata,
    seal_json,
    seal_tensors,
)
from penstock.errors import JournalError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5)], ids=str)
def test_tensors_come_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    value = bits.view(dtype).reshape(shape)
    blob = b"".join(seal_tensors({"a": value, "b": torch.ones(3)}, {"note": 'ä"\\'}))
    tensors, metadata = open_tensors(blob)
    assert tensors["a"].dtype == dtype and tensors["a"].shape == value.shape
    assert torch.equal(
        tensors["a"].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
    )
    assert metadata == read_metadata(blob[:400]) == {"note": 'ä"\\'}
    assert load(blob).keys() == {"a", "b"}  # any reader of the format takes it


def test_transposed_tensors_are_stored_by_value() -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    tensors, _ = open_tensors(b"".join(seal_tensors({"a": value}, {})))
    assert torch.equal(tensors["a"], value)


def test_a_document_without_tensors_or_members() -> None:
    assert open_tensors(b"".join(seal_tensors({}, {}))) == ({}, {})
    assert open_json(seal_json({})) == {}


def test_host_tensors_are_not_copied() -> None:
    value = torch.zeros(1000)
    *_, part = seal_tensors({"a": value}, {})
    value[0] = 1.0
    assert bytes(part)[:4] == b"\0\0\x80?"


def test_json_is_plain_and_exact() -> None:
    value = {"text": 'Überwachung\n"', "number": 0.1 + 0.2, "list": [1, None, True], "big": 1 << 70}
    blob = seal_json(value)
    assert open_json(blob) == value
    assert {k: v for k, v in json.loads(blob).items() if k != "digest"} == value


def test_nan_is_not_json() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        seal_json({"x": float("nan")})


@pytest.mark.parametrize("blob", [b"", b"{}", b'{"digest": "', b"\0" * 200], ids=repr)
def test_foreign_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(JournalError, match="damaged"):
        open_json(blob)
    with pytest.raises(JournalError, match="damaged"):
        open_tensors(blob)
