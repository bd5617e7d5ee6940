"""The GGUF header reader against the field's own writer, and against damaged files."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import HeaderError
from penstock.offload import gguf as reader
from penstock.offload.gguf import LongArray, is_gguf, read_gguf


def write(path: Path, *, alignment: int | None = None, tokens: int = 0) -> Path:
    """A file with plain and quantised tensors, every kind of metadata and an original shape."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "wan")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_bool("flag", True)
    writer.add_int64("negative", -5)
    writer.add_float32("pi", 3.25)
    writer.add_array("names", ["a", "bc"])
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [4, 2, 1, 4])
    if tokens:
        writer.add_array("tokens", [f"token{i}" for i in range(tokens)])
        writer.add_array("scores", [float(i) for i in range(tokens)])
    writer.add_tensor("plain", rng.standard_normal((3, 5), dtype=np.float32))
    writer.add_tensor("half", rng.standard_normal((7,)).astype(np.float16))
    writer.add_tensor("conv.weight", rng.standard_normal((1, 32), dtype=np.float32))
    for kind in ("Q8_0", "Q4_0", "Q5_1"):
        data = quants.quantize(
            rng.standard_normal((6, 64), dtype=np.float32), GGMLQuantizationType[kind]
        )
        writer.add_tensor(f"weight.{kind}", data, raw_dtype=GGMLQuantizationType[kind])
    blocks = rng.integers(0, 255, (4, 2 * 210), dtype=np.uint8)
    writer.add_tensor("weight.Q6_K", blocks, raw_dtype=GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_entries_point_at_the_bytes_the_field_reads(tmp_path, alignment):
    path = write(tmp_path / "x.gguf", alignment=alignment)
    header, theirs = read_gguf(path), GGUFReader(path)
    content = path.read_bytes()
    assert list(header.entries) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = header.entries[tensor.name]
        assert content[entry.offset : entry.offset + entry.nbytes] == tensor.data.tobytes()
        if tensor.name != "conv.weight":
            assert list(entry.shape) == list(reversed(tensor.shape.tolist()))
    assert header.entries["weight.Q8_0"].dtype == "GGUF_Q8_0"
    assert header.entries["weight.Q6_K"].shape == (4, 512)
    assert header.entries["half"].dtype == "F16"


def test_metadata_and_original_shape(tmp_path):
    header = read_gguf(write(tmp_path / "x.gguf"))
    assert header.architecture == "wan"
    assert header.version == 3
    assert (header.metadata["flag"], header.metadata["negative"]) == (True, -5)
    assert header.metadata["pi"] == 3.25
    assert header.metadata["names"] == ("a", "bc")
    assert header.entries["conv.weight"].shape == (4, 2, 1, 4)


def test_long_arrays_are_passed_over(tmp_path):
    header = read_gguf(write(tmp_path / "x.gguf", tokens=reader.MAX_INLINE_ITEMS + 1))
    tokens, scores = header.metadata["tokens"], header.metadata["scores"]
    assert isinstance(tokens, LongArray)
    assert (tokens.item_type, tokens.count) == (8, reader.MAX_INLINE_ITEMS + 1)
    content = (tmp_path / "x.gguf").read_bytes()
    assert content[tokens.offset : tokens.offset + 14] == struct.pack("<Q", 6) + b"token0"
    assert struct.unpack_from("<2f", content, scores.offset) == (0.0, 1.0)


def test_every_block_size_is_the_fields(tmp_path):
    from gguf.constants import GGML_QUANT_SIZES

    for number, (tag, block, nbytes) in reader.GGML_TYPES.items():
        kind = GGMLQuantizationType(number)
        assert GGML_QUANT_SIZES[kind] == (block, nbytes)
        assert tag.removeprefix("GGUF_") == kind.name
        assert tag.startswith("GGUF_") == (block > 1)


def raw(
    *,
    magic=b"GGUF",
    version=3,
    tensors=None,
    pairs=(),
    count=None,
    pair_count=None,
    data=64,
    alignment=32,
) -> bytes:
    """A GGUF file by hand, so that each field can lie."""
    tensors = [tensor()] if tensors is None else tensors
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if count is None else count,
        len(pairs) if pair_count is None else pair_count,
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + b"\0" * data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"t", dims=(8,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ONE = struct.pack("<I", 1)


def pair(key=b"k", kind=4, value=ONE) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HUGE = (1 << 64) - 1
DAMAGED = {
    "empty": (b"", "magic"),
    "magic": (raw(magic=b"GGUG"), "GGUG"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "version 1": (raw(version=1), "version 1"),
    "version 4": (raw(version=4), "version 4"),
    "big-endian": (raw(version=3 << 24), "little-endian"),
    "tensor count": (raw(count=HUGE), "items"),
    "one tensor too many": (raw(count=2, data=0), "at most"),
    "pair count": (raw(pair_count=HUGE), "items"),
    "key length": (raw(pairs=[struct.pack("<Q", HUGE)]), "items"),
    "long key": (raw(pairs=[pair(key=b"k" * 65536)]), "metadata key"),
    "key not utf-8": (raw(pairs=[pair(key=b"\xff\xfe")]), "UTF-8"),
    "value type": (raw(pairs=[pair(kind=13)]), "type 13"),
    "bool of 2": (raw(pairs=[pair(kind=7, value=b"\x02")]), "0 or 1"),
    "duplicate key": (raw(pairs=[pair(), pair()]), "twice"),
    "array of arrays": (raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 9, 1))]), "type 9"),
    "array of unknown": (raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 77, 1))]), "type 77"),
    "array length": (raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 12, HUGE))]), "items"),
    "array overflow": (raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 12, 1 << 61))]), "items"),
    "string array length": (
        raw(pairs=[pair(kind=9, value=struct.pack("<IQQ", 8, 1, HUGE))]),
        "items",
    ),
    "long string array": (
        raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 8, 5000) + text(b"") * 4999
                        + struct.pack("<Q", HUGE))]),
        "items",
    ),
    "string length": (raw(pairs=[pair(kind=8, value=struct.pack("<Q", 1 << 62))]), "items"),
    "alignment 0": (raw(pairs=[pair(b"general.alignment", 4, b"\0\0\0\0")]), "power of two"),
    "alignment 48": (raw(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 48))]), "48"),
    "alignment text": (raw(pairs=[pair(b"general.alignment", 8, text(b"32"))]), "'32'"),
    "alignment true": (raw(pairs=[pair(b"general.alignment", 7, b"\x01")]), "True"),
    "duplicate tensor": (raw(tensors=[tensor(), tensor()]), "twice"),
    "empty name": (raw(tensors=[tensor(name=b"")]), "name"),
    "nul in name": (raw(tensors=[tensor(name=b"a\0b")]), "name"),
    "long name": (raw(tensors=[tensor(name=b"n" * 1025)]), "at most 1024"),
    "name not utf-8": (raw(tensors=[tensor(name=b"\xc3\x28")]), "UTF-8"),
    "dims": (raw(tensors=[tensor(dims=(1,) * 9)]), "9 dimensions"),
    "dims count": (raw(tensors=[text(b"t") + struct.pack("<I", 0xFFFFFFFF)]), "dimensions"),
    "overflowing shape": (raw(tensors=[tensor(dims=(1 << 32, 1 << 32))]), "up to byte"),
    "past the end": (raw(tensors=[tensor(dims=(17,))]), "up to byte"),
    "offset past the end": (raw(tensors=[tensor(offset=HUGE - 31)]), "up to byte"),
    "offset unaligned": (raw(tensors=[tensor(dims=(2,), offset=8)]), "multiple of 32"),
    "unknown type": (raw(tensors=[tensor(kind=4)]), "type 4"),
    "removed type": (raw(tensors=[tensor(kind=31)]), "type 31"),
    "broken block": (raw(tensors=[tensor(dims=(33,), kind=8)]), "multiple of 32"),
    "scalar of blocks": (raw(tensors=[tensor(dims=(), kind=8)]), "rows of 1"),
    "overlap": (raw(tensors=[tensor(), tensor(name=b"u")]), "overlap"),
    "original shape": (
        raw(pairs=[pair(b"comfy.gguf.orig_shape.t", 9, struct.pack("<IQ2i", 5, 2, 3, 3))]),
        "original shape",
    ),
    "original shape text": (raw(pairs=[pair(b"comfy.gguf.orig_shape.t", 8, text(b"8"))]), "shape"),
    "negative original shape": (
        raw(pairs=[pair(b"comfy.gguf.orig_shape.t", 9, struct.pack("<IQ2i", 5, 2, -2, -4))]),
        "original shape",
    ),
}  # fmt: skip


def test_the_hand_made_file_is_good_when_nothing_lies(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(pairs=[pair()], tensors=[tensor(), tensor(name=b"u", offset=32)]))
    assert [entry.nbytes for entry in read_gguf(path).entries.values()] == [32, 32]
    assert len(GGUFReader(path).tensors) == 2


@pytest.mark.parametrize("content, word", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_headers_are_refused(tmp_path, content, word):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_gguf(path)
    assert word in str(caught.value)
    assert caught.value.expected


def test_every_truncation_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf")
    content = path.read_bytes()
    entries = read_gguf(path).entries.values()
    needed = max(entry.offset + entry.nbytes for entry in entries)
    for length in [*range(0, needed, 37), needed - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(HeaderError):
            read_gguf(path)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 700), value=st.binary(min_size=1, max_size=9))
def test_any_damage_is_a_header_error_or_harmless(tmp_path_factory, place, value):
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    content = bytearray(raw(pairs=[pair(), pair(b"s", 8, text(b"xyz"))], data=96))
    content[place % len(content) : place % len(content) + len(value)] = value
    path.write_bytes(content)
    try:
        header = read_gguf(path)
    except HeaderError:
        return
    for entry in header.entries.values():
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(content)


def test_magic_alone_tells_a_gguf_file(tmp_path):
    (tmp_path / "x").write_bytes(b"GGUF")
    (tmp_path / "y").write_bytes(b"GG")
    assert is_gguf(tmp_path / "x")
    assert not is_gguf(tmp_path / "y")


def test_a_lying_count_takes_no_memory(tmp_path):
    """In a child process: a sparse file of 4 GB and a count that fits it, within 200 MB."""
    path = tmp_path / "x.gguf"
    head = raw(pairs=[pair(kind=9, value=struct.pack("<IQ", 0, 3 << 30))], data=0)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(4 << 30)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))\n"
        "from pathlib import Path\n"
        "from penstock.offload.gguf import read_gguf\n"
        "from penstock.errors import HeaderError\n"
        "try: read_gguf(Path(sys.argv[1]))\n"
        "except HeaderError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "header limit" in done.stdout, done.stderr


def test_a_type_that_is_not_known_is_not_called_damage(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(tensors=[tensor(kind=99)]))
    with pytest.raises(HeaderError, match="type 99 of 't'.*newer than penstock") as refused:
        read_gguf(path)
    assert "damaged" not in str(refused.value)


def lying(tensors, pairs, body=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + body


def test_counts_beyond_any_file_are_refused_before_they_are_followed(tmp_path):
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"k"
    strings = struct.pack("<IIQ", 9, 8, reader.MAX_ITEMS) + bytes(8 * reader.MAX_ITEMS)
    cases = {
        "at most 65,536": lying(65_537, 0, bytes(24 * 65_537)),
        "items in all": lying(0, reader.MAX_ITEMS + 1, bytes(13 * (reader.MAX_ITEMS + 1))),
        "items of 'k'": lying(0, 1, key + strings),
    }
    for told, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(HeaderError, match=told):
            read_gguf(path)


def test_an_original_shape_of_many_numbers_is_not_multiplied_out(tmp_path):
    key = b"comfy.gguf.orig_shape.t"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 10, 4096)
    pair += struct.pack("<Q", (1 << 64) - 1) * 4096
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(lying(1, 1, pair + tensor) + bytes(4096))
    with pytest.raises(HeaderError, match="32 elements") as caught:
        read_gguf(path)
    assert len(str(caught.value)) < 700
