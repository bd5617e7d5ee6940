"""Schedules: legal in any order that respects them, and ahead as far as the rings allow."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.blocks import spread
from penstock.errors import UsageError
from penstock.offload.schedule import Compute, Copy, Op, Queue, Read, Ref, Residency, build_schedule


@st.composite
def residencies(draw: st.DrawFn, most_blocks: int = 8) -> Residency:
    """Any legal residency of a few blocks."""
    n = draw(st.integers(1, most_blocks))
    places = draw(st.lists(st.sampled_from("dhs"), min_size=n, max_size=n))
    on_device = tuple(i for i, place in enumerate(places) if place == "d")
    in_host = tuple(i for i, place in enumerate(places) if place == "h")
    slots = draw(st.integers(int(len(on_device) < n), 4))
    staging = draw(st.integers(int("s" in places), 4))
    return Residency(n, on_device, in_host, slots, staging)


class Memories:
    """Buffers by the visit that they hold, and who is still to use it; places of residents."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.staging: dict[int, tuple[int, bool]] = {}
        self.slots: dict[int, tuple[int, bool]] = {}
        self.kept: set[int] = set()
        self.resident = set[int]() if residency.staging_buffers else set(residency.device_resident)
        self.computed: list[int] = []

    def run(self, op: Op) -> None:
        """Do one operation, and complain if it harms another or uses the wrong block."""
        assert op.block == op.visit % self.residency.n_blocks
        if isinstance(op, Read):
            self._read(op)
        elif isinstance(op, Copy):
            self._copy(op)
        else:
            self._compute(op)

    def _read(self, op: Read) -> None:
        if op.buffer is None:
            assert op.block in self.residency.host_resident and op.block not in self.kept
            self.kept.add(op.block)
            return
        assert 0 <= op.buffer < self.residency.staging_buffers
        assert self.staging.get(op.buffer, (0, False))[1] is False, "staging buffer still needed"
        self.staging[op.buffer] = (op.visit, True)

    def _copy(self, op: Copy) -> None:
        if op.buffer is None:
            assert op.block in self.kept
        else:
            assert self.staging[op.buffer] == (op.visit, True), "not what was read"
            self.staging[op.buffer] = (op.visit, False)
        if op.slot is None:
            assert op.block in self.residency.device_resident and op.block not in self.resident
            self.resident.add(op.block)
            return
        assert 0 <= op.slot < self.residency.device_slots
        assert self.slots.get(op.slot, (0, False))[1] is False, "slot still needed"
        self.slots[op.slot] = (op.visit, True)

    def _compute(self, op: Compute) -> None:
        if op.slot is None:
            assert op.block in self.resident
        else:
            assert self.slots[op.slot] == (op.visit, True), "not what was copied"
            self.slots[op.slot] = (op.visit, False)
        self.computed.append(op.visit)


def shuffled(ops: list[Op], rng: random.Random) -> list[Op]:
    """A random order in which each queue keeps its own, and each operation comes after those it
    names."""
    done: set[Ref] = set()
    left, order = list(ops), []
    while left:
        heads = {op.ref.queue: op for op in reversed(left)}
        ready = [op for op in heads.values() if set(op.after) <= done]
        op = rng.choice(ready)
        left.remove(op)
        done.add(op.ref)
        order.append(op)
    return order


@settings(max_examples=150, deadline=None)
@given(residencies(), st.integers(1, 3))
def test_its_own_order_is_legal(residency: Residency, passes: int) -> None:
    memories, done = Memories(residency), set()
    for op in build_schedule(residency, passes):
        assert set(op.after) <= done
        memories.run(op)
        done.add(op.ref)
    assert memories.computed == list(range(passes * residency.n_blocks))


@settings(max_examples=200, deadline=None)
@given(residencies(6), st.integers(1, 3), st.integers(0, 1 << 30))
def test_any_order_that_respects_the_dependencies_is_legal(
    residency: Residency, passes: int, seed: int
) -> None:
    ops = list(build_schedule(residency, passes))
    assert len({op.ref for op in ops}) == len(ops)
    memories = Memories(residency)
    for op in shuffled(ops, random.Random(seed)):
        memories.run(op)
    assert memories.computed == list(range(passes * residency.n_blocks))


@pytest.mark.parametrize("kind", [Read, Copy, Compute])
def test_without_a_dependency_something_breaks(kind: type[Op]) -> None:
    residency = Residency(4, (), (1,), device_slots=2, staging_buffers=2)
    broken = 0
    for seed in range(50):
        ops: list[Any] = list(build_schedule(residency, 3))
        for op in ops:
            if isinstance(op, kind):
                object.__setattr__(op, "after", ())
        try:
            memories = Memories(residency)
            for op in shuffled(ops, random.Random(seed)):
                memories.run(op)
        except (AssertionError, KeyError):
            broken += 1
    assert broken > 0


@settings(max_examples=100, deadline=None)
@given(residencies(), st.integers(1, 4))
def test_nothing_waits_further_back_than_said(residency: Residency, passes: int) -> None:
    for op in build_schedule(residency, passes):
        for ref in op.after:
            assert 0 <= op.visit - ref.visit <= residency.longest_wait


def test_what_moves_and_what_does_not() -> None:
    residency = Residency(5, (0, 3), (2,), device_slots=2, staging_buffers=1)
    assert residency.streamed == (1, 2, 4)
    assert residency.disk_blocks == (1, 4)
    assert residency.through_staging == (0, 1, 3, 4)
    ops = list(build_schedule(residency, 2))
    assert [op.block for op in ops if isinstance(op, Read)] == [0, 1, 2, 3, 4, 1, 4]
    assert [op.buffer for op in ops if isinstance(op, Read)] == [0, 0, None, 0, 0, 0, 0]
    assert [op.block for op in ops if isinstance(op, Copy)] == [0, 1, 2, 3, 4, 1, 2, 4]
    assert [op.slot for op in ops if isinstance(op, Copy)] == [None, 0, 1, None, 0, 1, 0, 1]
    assert [op.block for op in ops if isinstance(op, Compute)] == [0, 1, 2, 3, 4] * 2


def test_residents_of_the_device_come_before_the_first_cycle_where_there_is_no_slab() -> None:
    residency = Residency(3, (0, 2), (1,), device_slots=1)
    assert residency.through_staging == ()
    ops = list(build_schedule(residency, 2))
    assert [op.block for op in ops if isinstance(op, Read)] == [1]
    assert [op.block for op in ops if isinstance(op, Copy)] == [1, 1]


def test_rings_wrap_around_and_end_with_the_last_cycle() -> None:
    ops = list(build_schedule(Residency(3, device_slots=2, staging_buffers=2), 2))
    by_ref = {op.ref: op for op in ops}
    first_of_second = by_ref[Ref(Queue.READ, 3)]
    assert first_of_second.after == (Ref(Queue.COPY, 1),), "read while the first pass computes"
    assert by_ref[Ref(Queue.COPY, 3)].after == (Ref(Queue.READ, 3), Ref(Queue.COMPUTE, 1))
    assert max(op.visit for op in ops) == 5


def test_the_schedule_is_lazy() -> None:
    assert len(
        list(islice(build_schedule(Residency(40, device_slots=1, staging_buffers=1), 10**9), 9))
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Residency(0),
        lambda: Residency(3, (3,), (0, 1, 2), 1),
        lambda: Residency(3, (-1,), (), 1, 1),
        lambda: Residency(3, (1, 0), (), 1, 1),
        lambda: Residency(3, (1, 1), (), 1, 1),
        lambda: Residency(3, (0, 1), (1, 2), 1, 1),
        lambda: Residency(3, (), (5,), 1, 1),
        lambda: Residency(3, (0, 1), (2,), 0, 0),
        lambda: Residency(3, (0, 1), (), 1, 0),
        lambda: Residency(3, (0, 1), (), 0, 1),
        lambda: Residency(3, (0, 1, 2), (), -1, 0),
        lambda: Residency(3, (0, 1, 2), (), 0, -1),
        lambda: build_schedule(Residency(1, (0,)), 0),
        lambda: spread(3, 4),
        lambda: spread(3, -1),
    ],
)
def test_illegal_values_die_at_once(make: Any) -> None:
    with pytest.raises(UsageError, match="illegal residency: .*expected"):
        make()


def test_no_ring_is_needed_where_nothing_streams() -> None:
    assert Residency(2, (0, 1)).streamed == ()
    assert Residency(2, (0,), (1,), 1).disk_blocks == ()
    assert [type(op) for op in build_schedule(Residency(2, (0, 1)), 1)] == [Compute, Compute]


@given(st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_spread_is_even_around_the_circle(case: tuple[int, int]) -> None:
    n, k = case
    places = spread(n, k)
    assert len(places) == k == len(set(places)) and list(places) == sorted(places)
    assert all(0 <= place < n for place in places)
    if k:
        gaps = [b - a for a, b in zip(places, (*places[1:], places[0] + n), strict=True)]
        assert max(gaps) - min(gaps) <= 1
