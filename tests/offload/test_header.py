"""Headers: everything that the safetensors library refuses is refused, and more."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from penstock.errors import CheckpointError, HeaderError
from penstock.formats.tags import ITEM_BYTES
from penstock.offload import header
from penstock.offload.files import WeightFile
from penstock.offload.header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    HeaderFault,
    parse_header,
    parse_object,
    read_header,
)
from tests.offload.blocks import raw_file


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> Any:
    listed = [list(x) if isinstance(x, tuple) else x for x in (shape, offsets)]
    return {"dtype": dtype, "shape": listed[0], "data_offsets": listed[1], **more}


FOUR = b"abcd"
GOOD = raw_file({"a": tensor()}, FOUR)

# What the library refuses too.
REFUSED_BY_BOTH = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "length only": bytes(8),
    "length zero": bytes(8) + b"{}",
    "length one": raw_file("{", length=1),
    "length beyond the file": raw_file("{}", length=3),
    "length beyond the limit": raw_file("{}", length=MAX_HEADER_BYTES + 1),
    "length of all ones": b"\xff" * 8 + b"{}",
    "length cuts the header": raw_file({"a": tensor()}, FOUR, length=10),
    "length into the data": raw_file({"a": tensor()}, FOUR, length=62),
    "not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "not JSON": raw_file("{nonsense}"),
    "byte order mark": raw_file(b"\xef\xbb\xbf{}"),
    "a list": raw_file("[]"),
    "a text": raw_file('"model"'),
    "something after the object": raw_file("{}{}"),
    "open object": raw_file('{"a": '),
    "trailing comma": raw_file('{"__metadata__": {"a": "b"},}'),
    "deep nesting": raw_file('{"a":' + "[" * 5000 + "]" * 5000 + "}"),
    "control character in a name": raw_file('{"a\x01": {}}'),
    "half a surrogate pair": raw_file('{"\\ud800": ' + json.dumps(tensor()) + "}", FOUR),
    "tensor is a number": raw_file({"a": 4}, FOUR),
    "tensor is null": raw_file({"a": None}),
    "tensor is an empty object": raw_file({"a": {}}),
    "no dtype": raw_file({"a": {"shape": [4], "data_offsets": [0, 4]}}, FOUR),
    "no shape": raw_file({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR),
    "no offsets": raw_file({"a": {"dtype": "U8", "shape": [4]}}, FOUR),
    "unknown dtype": raw_file({"a": tensor("Q8_0")}, FOUR),
    "dtype in small letters": raw_file({"a": tensor("u8")}, FOUR),
    "dtype is a number": raw_file({"a": tensor(8)}, FOUR),
    "dtype is a list": raw_file({"a": tensor(["U8"])}, FOUR),
    "shape is a number": raw_file({"a": tensor(shape=4)}, FOUR),
    "shape is a text": raw_file({"a": tensor(shape="4")}, FOUR),
    "negative size": raw_file({"a": tensor(shape=(-4,))}, FOUR),
    "two negative sizes": raw_file({"a": tensor(shape=(-2, -2))}, FOUR),
    "size with a fraction": raw_file({"a": tensor(shape=(4.5,))}, FOUR),
    "size as a float": raw_file({"a": tensor(shape=(4.0,))}, FOUR),
    "size as a power": raw_file('{"a": {"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}', FOUR),
    "size is NaN": raw_file('{"a": {"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "size is minus zero": raw_file('{"a": {"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "size is true": raw_file({"a": tensor(shape=(True,), offsets=(0, 1))}, b"a"),
    "size is null": raw_file({"a": tensor(shape=(None,))}, FOUR),
    "size is a text": raw_file({"a": tensor(shape=("4",))}, FOUR),
    "size beyond 64 bits": raw_file({"a": tensor(shape=(1 << 64,))}, FOUR),
    "size of a thousand digits": raw_file({"a": tensor(shape=(10**1000,))}, FOUR),
    "size of five thousand digits": raw_file(
        '{"a": {"dtype":"U8","shape":[' + "1" * 5000 + '],"data_offsets":[0,4]}}', FOUR
    ),
    "product wraps to the extent": raw_file({"a": tensor(shape=(1 << 62, 4), offsets=(0, 0))}),
    "product wraps before a zero": raw_file({"a": tensor(shape=(1 << 63, 2, 0), offsets=(0, 0))}),
    "bytes wrap to the extent": raw_file({"a": tensor("F32", (1 << 62,), (0, 0))}),
    "one offset": raw_file({"a": tensor(offsets=(4,))}, FOUR),
    "three offsets": raw_file({"a": tensor(offsets=(0, 2, 4))}, FOUR),
    "offsets as an object": raw_file({"a": tensor(offsets={"start": 0, "end": 4})}, FOUR),
    "offsets backwards": raw_file({"a": tensor(offsets=(4, 0))}, FOUR),
    "negative offset": raw_file({"a": tensor(offsets=(-4, 0))}, FOUR),
    "offset as a float": raw_file({"a": tensor(offsets=(0.0, 4.0))}, FOUR),
    "extent too long": raw_file({"a": tensor(shape=(3,))}, FOUR),
    "extent too short": raw_file({"a": tensor(shape=(5,))}, FOUR),
    "extent of another dtype": raw_file({"a": tensor("F32", (4,))}, FOUR),
    "data missing": raw_file({"a": tensor()}),
    "data cut": raw_file({"a": tensor()}, b"abc"),
    "data left over": raw_file({"a": tensor()}, b"abcde"),
    "data without tensors": raw_file({}, FOUR),
    "hole at the beginning": raw_file({"a": tensor(offsets=(1, 5))}, b"abcde"),
    "hole between": raw_file({"a": tensor(), "b": tensor(offsets=(5, 9))}, bytes(9)),
    "overlap": raw_file({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)),
    "same bytes twice": raw_file({"a": tensor(), "b": tensor()}, FOUR),
    "metadata is a list": raw_file({"__metadata__": ["pt"]}),
    "metadata holds a number": raw_file({"__metadata__": {"steps": 4}}),
    "metadata holds an object": raw_file({"__metadata__": {"a": {"b": "c"}}}),
    "a GGUF file": b"GGUF" + bytes(60),
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
}

# Where the library is lax.
REFUSED_BY_US = {
    "leading space": raw_file(" {}"),
    "a tensor twice": raw_file(f'{{"a":{json.dumps(tensor())},"a":{json.dumps(tensor())}}}', FOUR),
    "metadata key twice": raw_file('{"__metadata__":{"a":"b","a":"c"}}'),
    "unknown field": raw_file({"a": tensor(checksum="0")}, FOUR),
    "metadata is null": raw_file({"__metadata__": None}),
    "name climbs out": raw_file({"../../etc/passwd": tensor()}, FOUR),
    "name climbs inside": raw_file({"a/../b": tensor()}, FOUR),
    "name is a dot": raw_file({".": tensor()}, FOUR),
    "absolute name": raw_file({"/etc/passwd": tensor()}, FOUR),
    "drive name": raw_file({"C:model": tensor()}, FOUR),
    "backslash name": raw_file({"a\\b": tensor()}, FOUR),
    "name with NUL": raw_file({"a\0b": tensor()}, FOUR),
    "name with a line break": raw_file({"a\nb": tensor()}, FOUR),
    "name with an escape": raw_file({"a\x1b[31m": tensor()}, FOUR),
    "empty name": raw_file({"": tensor()}, FOUR),
    "half-byte type": raw_file({"a": tensor("F4", (8,))}, FOUR),
    "three-quarter-byte type": raw_file({"a": tensor("F6_E2M3", (4,), (0, 3))}, b"abc"),
}


def verdict(path: Path, content: bytes) -> str | None:
    """Why our reader refuses the file, or None."""
    path.write_bytes(content)
    try:
        with WeightFile(path) as file:
            read_header(file)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_the_library_refuses(name: str, tmp_path: Path) -> None:
    with pytest.raises(SafetensorError):
        deserialize(REFUSED_BY_BOTH[name])
    refusal = verdict(tmp_path / "bad.safetensors", REFUSED_BY_BOTH[name])
    assert refusal is not None
    assert "bad.safetensors" in refusal and "expected" in refusal and len(refusal) < 600


@pytest.mark.parametrize("name", REFUSED_BY_US)
def test_what_only_we_refuse(name: str, tmp_path: Path) -> None:
    deserialize(REFUSED_BY_US[name])
    refusal = verdict(tmp_path / "bad.safetensors", REFUSED_BY_US[name])
    assert refusal is not None and "expected" in refusal


def test_the_table_is_as_long_as_it_claims() -> None:
    contents = {*REFUSED_BY_BOTH.values(), *REFUSED_BY_US.values()}
    assert len(contents) == len(REFUSED_BY_BOTH) + len(REFUSED_BY_US) >= 80


def test_a_good_header(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    header = {
        "__metadata__": {"format": "pt", "é": "ü"},
        "later": tensor("F32", (1, 2), (4, 12)),
        "empty": tensor("BF16", (0, 3), (4, 4)),
        "first/ok": tensor(),
        "scalar": tensor("F64", (), (12, 20)),
    }
    path.write_bytes(raw_file(json.dumps(header) + "   ", bytes(20)))
    with WeightFile(path) as file:
        found = read_header(file)
    assert list(found.tensors) == ["first/ok", "empty", "later", "scalar"]
    assert found.metadata == {"format": "pt", "é": "ü"}
    later = found.tensors["later"]
    assert (later.dtype, later.shape, later.start, later.end) == ("F32", (1, 2), 4, 12)
    assert found.data_start == path.stat().st_size - 20


def test_no_tensor_is_fine(tmp_path: Path) -> None:
    assert verdict(tmp_path / "none.safetensors", raw_file({})) is None
    assert verdict(tmp_path / "good.safetensors", GOOD) is None


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_sizes_of_types_are_the_librarys(dtype: str, tmp_path: Path) -> None:
    nbytes = 3 * ITEM_BYTES[dtype]
    content = raw_file({"a": tensor(dtype, (3,), (0, nbytes))}, bytes(nbytes))
    deserialize(content)
    assert verdict(tmp_path / "typed.safetensors", content) is None


def test_a_long_finding_is_cut(tmp_path: Path) -> None:
    refusal = verdict(tmp_path / "x.safetensors", raw_file({"a": tensor("Q" * 9000)}, FOUR))
    assert refusal is not None and "QQQ..." in refusal and len(refusal) < 400


def test_an_index_may_be_any_object() -> None:
    text = b'{"a": {"b": [1.5, "c"]}}'
    assert parse_object(text, fractions=True) == {"a": {"b": [1.5, "c"]}}
    with pytest.raises(ValueError, match="whole numbers only"):
        parse_object(text)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or exchange a few bytes, mostly in the header."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        header_end = min(len(data), 8 + 250)
        at = rng.randrange(header_end)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 4)]
        elif kind == 2:
            data[at:at] = rng.choice([b"0", b"-", b"1", b"9", b",", b'"', b"[", b"]", b"{", b"}"])
        elif kind == 3:
            data[at : at + 1] = rng.choice([b"e1", b".0", b"null", b"true", b"NaN", b"\\u0000"])
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 30)]
        else:
            del data[rng.randrange(len(data)) :]
        if not data:
            break
        if rng.random() < 0.7 and len(data) >= 8:  # keep the length right, to get further
            end = data.rfind(b"}") + 1
            data[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(data)


def test_fuzz_against_the_library(tmp_path: Path) -> None:
    rng = random.Random(20)
    seeds = [
        save({"a": torch.ones(2, 3), "b.weight": torch.ones(4).half()}, {"format": "pt"}),
        raw_file({"x": tensor(), "y": tensor("F32", (1,), (4, 8))}, bytes(8)),
        raw_file({"__metadata__": {"a": "1"}, "x": tensor("U8", (2, 2))}, FOUR),
    ]
    path = tmp_path / "fuzz.safetensors"
    refused = 0
    for _ in range(1500):
        content = mutate(rng.choice(seeds), rng)
        try:
            deserialize(content)
        except SafetensorError:
            refused += 1
            assert verdict(path, content) is not None, content
    assert refused > 700


def test_errors_are_of_the_right_class(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(REFUSED_BY_BOTH["hole between"])
    with WeightFile(path) as file, pytest.raises(HeaderError) as caught:
        read_header(file)
    assert caught.value.expected == "b to start at byte 4 of the data"
    assert caught.value.found == "5"
    assert caught.value.remedy is not None


def test_many_keys_twice_are_found_in_one_pass(tmp_path):
    """Counting every name anew took minutes here; the test's own time limit tells."""
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    pairs = [f'"a{number}":{entry}' for number in range(60_000)]
    text = "{" + ",".join([*pairs, pairs[7]]) + "}"
    with pytest.raises(HeaderFault) as caught:
        parse_object(text.encode())
    assert caught.value.found == "a7"


def test_more_tensors_than_anything_has_are_refused(monkeypatch):
    assert MAX_TENSORS == 65_536  # a tenth is tried: each costs a microsecond or twenty
    most = MAX_TENSORS // 10
    monkeypatch.setattr(header, "MAX_TENSORS", most)
    entry = '{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    for count in (most, most + 1):
        pairs = [f'"{number}":{entry % (number, number + 1)}' for number in range(count)]
        text = ("{" + ",".join(pairs) + "}").encode()
        if count == most:
            assert len(parse_header(text, 8 + len(text) + count).tensors) == count
            continue
        with pytest.raises(HeaderFault, match="at most 6,553 tensors"):
            parse_header(text, 8 + len(text) + count)


@pytest.mark.parametrize("part", ["[],", "1,", '"",', "[[],"])
def test_a_text_of_countless_values_is_not_read(part, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(HeaderFault, match="tokens"):
        parse_object(b'{"a": [' + part.encode() * 4_000_001 + b"1]}")


def test_long_names_and_odd_ones_are_shown_as_text(tmp_path):
    for name, found in (("a" * 1025, "1025"), ("\x1b[31m", "'\\x1b[31m'")):
        path = tmp_path / "x.safetensors"
        text = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(HeaderError) as caught, WeightFile(path) as file:
            read_header(file)
        assert found in str(caught.value)
