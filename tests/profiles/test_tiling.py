"""Geometry of the exact tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import UsageError
from penstock.profiles.tiling import (
    Convolved,
    Span,
    TileGrid,
    VaeLevels,
    Window,
    decode_tiles,
    encode_tiles,
)

WAN = VaeLevels(levels=4, num_res_blocks=2)


def halo(outer: Span, core: Span) -> tuple[int, int]:
    return core.lo - outer.lo, outer.hi - core.hi


def test_halos_of_the_true_decoder() -> None:
    middle = decode_tiles(WAN, TileGrid(3, 3), 90, 160)[4]
    assert middle.output == Window(Span(240, 480), Span(53 * 8, 106 * 8))
    assert halo(middle.tail.rows, Span(30, 60)) == (7, 7)
    for level, expected in zip(middle.levels, (12, 10, 7), strict=True):
        scale = 240 // 30 >> 3 - middle.levels.index(level) - 1
        assert halo(level[0].rows, Span(30 * scale, 60 * scale)) == (expected, expected)
        assert halo(level[0].cols, Span(53 * scale, 106 * scale)) == (expected, expected)


def test_halos_of_the_true_encoder() -> None:
    middle = encode_tiles(WAN, TileGrid(3, 3), 90, 160)[4]
    assert halo(middle.pixels.rows, Span(240, 480)) == (29, 36)
    assert halo(middle.pixels.cols, Span(53 * 8, 106 * 8)) == (29, 36)
    assert middle.output == Window(Span(30, 60), Span(53, 106))


def test_halos_follow_the_architecture() -> None:
    middle = decode_tiles(VaeLevels(4, 1), TileGrid(3, 1), 90, 2)[1]
    assert [halo(level[0].rows, Span(30 << at, 60 << at)) for at, level in
            enumerate(middle.levels, start=1)] == [(8, 8), (7, 7), (5, 5)]  # fmt: skip
    assert halo(middle.tail.rows, Span(30, 60)) == (5, 5)


def test_borders_of_the_picture_need_no_halo() -> None:
    (tile,) = decode_tiles(WAN, TileGrid(1, 1), 5, 7)
    for at, level in enumerate(tile.levels, start=1):
        assert set(level) == {Window.whole(5 << at, 7 << at)}
    (tile,) = encode_tiles(WAN, TileGrid(1, 1), 5, 7)
    for at, level in enumerate(tile.levels):
        assert set(level[:-1]) == {Window.whole(40 >> at, 56 >> at)}
        assert level[-1] == Window.whole(20 >> at, 28 >> at)


@st.composite
def gridded(draw):
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    grid = TileGrid(draw(st.integers(1, min(6, height))), draw(st.integers(1, min(6, width))))
    return VaeLevels(draw(st.integers(2, 4)), draw(st.integers(1, 3))), grid, height, width


@given(gridded())
def test_outputs_cover_each_pixel_once(case) -> None:
    arch, grid, height, width = case
    for tiles, factor in (
        (decode_tiles(*case), arch.factor),
        (encode_tiles(*case), 1),
    ):
        seen = [
            (row, col)
            for tile in tiles
            for row in range(tile.output.rows.lo, tile.output.rows.hi)
            for col in range(tile.output.cols.lo, tile.output.cols.hi)
        ]
        assert len(tiles) == grid.rows * grid.cols
        assert len(seen) == len(set(seen)) == height * width * factor**2


@given(gridded())
def test_every_window_holds_what_the_next_layer_reads(case) -> None:
    arch, _, height, width = case
    sizes = height, width
    for tile in decode_tiles(*case):
        low = tile.tail
        for at, level in enumerate(tile.levels, start=1):
            chain = [low.scaled(2), *level]
            for axis, size in zip(("rows", "cols"), sizes, strict=True):
                spans = [getattr(window, axis) for window in chain]
                for before, after in zip(spans, spans[1:], strict=False):
                    assert before.lo <= max(0, after.lo - 1)
                    assert before.hi >= min(size << at, after.hi + 1)
            low = level[-1]
    for tile in encode_tiles(*case):
        for at, level in enumerate(tile.levels):
            for axis, size in zip(("rows", "cols"), sizes, strict=True):
                full = size * arch.factor >> at
                *spans, out = (getattr(window, axis) for window in level)
                for before, after in zip(spans, spans[1:], strict=False):
                    assert before == after.grown(1, 1, full)
                assert spans[-1] == Span(2 * out.lo, min(full, 2 * out.hi + 1))


def test_a_convolution_pads_only_where_the_picture_ends() -> None:
    assert Span(4, 10).convolved(Span(5, 9)) == Convolved(0, Span(5, 9), slice(0, 4))
    assert Span(4, 10).convolved(Span(6, 9)) == Convolved(0, Span(5, 9), slice(1, 4))
    assert Span(0, 10).convolved(Span(0, 9)) == Convolved(1, Span(0, 10), slice(0, 9))
    assert Span(4, 10).convolved(Span(5, 10)) == Convolved(1, Span(4, 10), slice(1, 6))


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (-1, 2)])
def test_empty_grids_are_refused(shape) -> None:
    with pytest.raises(UsageError, match="too small"):
        TileGrid(*shape)


@pytest.mark.parametrize("shape", [(4, 1), (1, 6)])
def test_grids_finer_than_the_latents_are_refused(shape) -> None:
    with pytest.raises(UsageError, match="finer"):
        decode_tiles(WAN, TileGrid(*shape), 3, 5)


@pytest.mark.parametrize("arch", [(1, 2), (4, 0)])
def test_vaes_without_levels_are_refused(arch) -> None:
    with pytest.raises(UsageError, match="nothing to tile"):
        VaeLevels(*arch)
