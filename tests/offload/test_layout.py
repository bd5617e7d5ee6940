"""Layouts: aligned, tight, and read with few reads."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from penstock.blocks import TENSOR_ALIGNMENT
from penstock.offload.checkpoint import Checkpoint, TensorEntry
from penstock.offload.layout import BlockLayout
from tests.offload.blocks import aligned_file, layouts_of, random_blocks, same


def fill(layout: BlockLayout) -> torch.Tensor:
    """A buffer with the extents of a layout read the plain way; all else is 0xAA."""
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    for extent in layout.extents:
        data = extent.file.read_bytes()[extent.file_offset :][: extent.nbytes]
        assert len(data) == extent.nbytes
        buffer[extent.buffer_offset :][: extent.nbytes] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )
    return buffer


def entry(
    offset: int, nbytes: int, file: str = "f", dtype: str = "U8", shape: tuple[int, ...] = ()
) -> TensorEntry:
    return TensorEntry(f"{file}@{offset}", Path(file), offset, dtype, shape or (nbytes,), nbytes)


def test_views_are_the_tensors(tmp_path: Path) -> None:
    (block,) = random_blocks(1)
    save_file({f"blocks.0.{name}": tensor for name, tensor in block.items()}, tmp_path / "a")
    (layout,) = layouts_of(tmp_path / "a", 1)
    buffer = fill(layout)
    views = layout.views(buffer)
    assert same(views, block)
    assert all(v.untyped_storage().data_ptr() == buffer.data_ptr() for v in views.values())
    assert layout.nbytes % 4096 == 0
    assert layout.read_bytes == sum(t.nbytes for t in block.values())


def test_a_run_that_the_file_holds_aligned_is_one_read() -> None:
    layout = BlockLayout.from_entries({
        "a": entry(1000, 128), "b": entry(1128, 64), "c": entry(1192, 10),
    })  # fmt: skip
    assert [(e.file_offset, e.nbytes, e.buffer_offset) for e in layout.extents] == [(1000, 202, 0)]
    assert [layout.places[name].offset for name in "abc"] == [0, 128, 192]


def test_misaligned_neighbours_become_reads_of_their_own() -> None:
    layout = BlockLayout.from_entries({"b": entry(1010, 20), "a": entry(1000, 10)})
    assert [(e.file_offset, e.nbytes, e.buffer_offset) for e in layout.extents] == [
        (1000, 10, 0),
        (1010, 20, 64),
    ]
    assert list(layout.places) == ["b", "a"]


def test_small_gaps_are_read_along_and_large_ones_are_not() -> None:
    near = BlockLayout.from_entries({"a": entry(0, 10), "b": entry(64, 10)})
    assert [(e.nbytes, e.buffer_offset) for e in near.extents] == [(74, 0)]
    far = BlockLayout.from_entries({"a": entry(0, 64), "b": entry(8192, 10)})
    assert [(e.nbytes, e.buffer_offset) for e in far.extents] == [(64, 0), (10, 4096)]


def test_a_pack_is_read_directly_and_at_once(tmp_path: Path) -> None:
    (block,) = random_blocks(1)
    aligned_file(tmp_path / "pack", {f"blocks.0.{name}": t for name, t in block.items()})
    (layout,) = layouts_of(tmp_path / "pack", 1)
    (extent,) = layout.extents
    assert extent.file_offset % 4096 == 0 == extent.buffer_offset
    assert same(layout.views(fill(layout)), block)


def test_several_files_and_shared_bytes(tmp_path: Path) -> None:
    first, second = random_blocks(2)
    save_file(first, tmp_path / "one")
    save_file(second, tmp_path / "two")
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    layout = BlockLayout.from_entries(
        {"w": two["weight"], "b": one["bias"], "tied": two["weight"], "s": one["scale"]}
    )
    assert {e.file.name for e in layout.extents} == {"one", "two"}
    assert set(layout.stamps) == {tmp_path / "one", tmp_path / "two"}
    views = layout.views(fill(layout))
    assert views["tied"].data_ptr() == views["w"].data_ptr()
    expected = {"w": second["weight"], "b": first["bias"], "tied": second["weight"]}
    assert same(views, {**expected, "s": first["scale"]})


def test_nothing_and_next_to_nothing() -> None:
    empty = BlockLayout.from_entries({})
    assert (empty.nbytes, empty.extents, dict(empty.places)) == (0, (), {})
    layout = BlockLayout.from_entries(
        {"none": entry(8, 0, shape=(0, 3)), "one": entry(8, 1), "half": entry(9, 0, dtype="F32")}
    )
    assert layout.nbytes == 4096 and layout.read_bytes == 1
    assert layout.views(torch.zeros(4096, dtype=torch.uint8))["none"].shape == (0, 3)


def test_packed_types_come_as_bytes() -> None:
    layout = BlockLayout.from_entries({"q": entry(32, 34, dtype="GGUF_Q8_0", shape=(32,))})
    view = layout.views(torch.zeros(4096, dtype=torch.uint8))["q"]
    assert view.dtype == torch.uint8 and view.shape == (34,)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9000), st.booleans()), max_size=12),
    st.randoms(use_true_random=False),
)
def test_every_byte_of_every_tensor_is_read_to_its_place(pieces, rng) -> None:  # type: ignore[no-untyped-def]
    entries, position = {}, {"f": 0, "g": 0}
    for number, (nbytes, gap, other) in enumerate(pieces):
        file = "g" if other else "f"
        entries[str(number)] = entry(position[file] + gap, nbytes, file)
        position[file] += gap + nbytes
    shuffled = list(entries.items())
    rng.shuffle(shuffled)
    layout = BlockLayout.from_entries(dict(shuffled))
    origin = {}
    for extent in layout.extents:
        for i in range(extent.nbytes):
            assert extent.buffer_offset + i not in origin
            origin[extent.buffer_offset + i] = (extent.file, extent.file_offset + i)
    for name, place in layout.places.items():
        assert place.offset % TENSOR_ALIGNMENT == 0
        assert place.offset + place.nbytes <= layout.nbytes
        for i in range(place.nbytes):
            wanted = (entries[name].file, entries[name].offset + i)
            assert origin[place.offset + i] == wanted
