"""Runs of equal frames against what layers really see, frame by frame."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.families.wan.cost.runs import after_halving, after_layer, clip_runs
from penstock.errors import UsageError
from penstock.profiles.phases import FIRST_FRAME

RUNS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def frames_of(runs) -> list[int]:
    """A clip of such runs: each frame told by the run that it is of."""
    return [index for index, length in enumerate(runs) for _ in range(length)]


def lengths(seen) -> list[int]:
    """How often the same thing is seen in a row."""
    return [len(list(group)) for _, group in groupby(seen)]


@given(RUNS, st.integers(0, 4))
def test_a_layer_computes_as_often_as_what_it_sees_changes(runs, reach) -> None:
    frames = [None] * reach + frames_of(runs)
    seen = [tuple(frames[at : at + reach + 1]) for at in range(len(frames) - reach)]
    assert after_layer(runs, reach) == lengths(seen)


@given(RUNS)
def test_halving_computes_as_often_as_what_it_sees_changes(runs) -> None:
    frames = frames_of(runs)
    frames = frames[: len(frames) - 1 + len(frames) % 2]  # 2n + 1 frames
    seen = ["first", *(tuple(frames[at : at + 3]) for at in range(0, len(frames) - 2, 2))]
    assert after_halving(lengths(frames)) == lengths(seen)


def test_runs_begin_where_frames_change() -> None:
    assert clip_runs(81, FIRST_FRAME) == [(0, 1), (1, 80)]
    assert clip_runs(81, (0, 1, 80)) == [(0, 1), (1, 79), (80, 1)]
    assert clip_runs(1, FIRST_FRAME) == [(0, 1)]
    assert clip_runs(3, None) == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("changes", [(), (1,), (0, 2, 2), (0, 3, 1), (-1, 0)])
def test_changes_out_of_order_are_refused(changes) -> None:
    with pytest.raises(UsageError, match="not in order"):
        clip_runs(5, changes)
