"""The planner's streams on random simulated machines, against the bound; the full count is
`benchmarks/overlap.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.overlap import TARGET, Row, rows, summary
from benchmarks.simulated import Block, Machine, least_seconds, simulate
from penstock.offload.schedule import Residency
from tests.offload.test_schedule import residencies

ROOM = 1 << 62


@settings(max_examples=150, deadline=None)
@given(
    residencies(),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 9)), min_size=8, max_size=8),
    st.floats(0.5, 20),
    st.floats(0.5, 20),
)
def test_nothing_is_faster_than_the_bound(
    residency: Residency,
    passes: int,
    numbers: list[tuple[int, float]],
    read: float,
    copy: float,
) -> None:
    blocks = tuple(Block(*pair) for pair in numbers[: residency.n_blocks])
    machine = Machine(read, copy, ROOM, ROOM)
    least = least_seconds(residency, blocks, machine, passes)
    line = simulate(residency, blocks, machine, passes)
    assert line.seconds >= least * (1 - 1e-9)
    loads = {queue: line.busy_s(queue) for queue in {span.op.ref.queue for span in line.spans}}
    assert least >= max(loads.values()) * (1 - 1e-9)


def test_the_bound_by_hand() -> None:
    blocks, machine = (Block(10, 5.0),) * 4, Machine(10.0, 10.0, ROOM, ROOM)
    assert least_seconds(Residency(4, (), (), 2, 2), blocks, machine, 3) == 1 + 1 + 12 * 5
    # One slot: each copy waits for the computation before it.
    assert least_seconds(Residency(4, (), (), 1, 2), blocks, machine, 3) == 12 * 6
    # All residents: the first pass waits for the disk, the others compute.
    slow = Machine(1.0, 10.0, ROOM, ROOM)
    assert least_seconds(Residency(4, (0, 1, 2, 3), (), 0, 1), blocks, slow, 3) == 44 + 5 + 40


def test_random_machines_come_near_the_bound() -> None:
    found = list(rows(40, seed=5))
    report = summary(found)
    assert report["below"] == 0, report["rows_below"]
    assert report["reach_98"] >= 36 and min(row.efficiency for row in found) > 0.8
    for row in found:
        assert row.predicted == pytest.approx(1, rel=0.02)
        assert (
            row.efficiency >= TARGET
            or 1 in (row.slots, row.staging)
            or 2
            in (
                row.slots,
                row.staging,
            )
        )


def test_what_falls_short_is_counted() -> None:
    good = Row(4, 0, 0, 2, 2, 4, 0.99, 0.99, 1.0)
    held, bad = replace(good, efficiency=0.9), replace(good, efficiency=0.9, with_long_rings=0.9)
    report = summary([good, held, bad])
    assert (report["reach_98"], report["held_back_by_short_rings"], report["below"]) == (1, 1, 1)
