"""The simulated device: the clock of a schedule, against arithmetic that can be done by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulated import Block, Machine, simulate
from penstock.errors import LedgerOverflow, UsageError
from penstock.offload.schedule import Queue, Read, Residency
from tests.offload.test_schedule import residencies

ROOM = 1 << 40


def machine(read: float = 1.0, copy: float = 1.0, device: int = ROOM, host: int = ROOM) -> Machine:
    return Machine(read, copy, device, host)


def test_bound_by_the_computation() -> None:
    blocks = (Block(10, 5.0),) * 4
    line = simulate(Residency(4, (), (), 2, 2), blocks, machine(read=10, copy=10), 3)
    assert line.seconds == 2 + 12 * 5
    assert line.stall_s(Queue.COMPUTE) == 2
    assert line.busy_s(Queue.COMPUTE) == 60 and line.busy_s(Queue.COPY) == 12
    assert (line.device_bytes, line.host_bytes, line.opening_s) == (20, 20, 0)


def test_bound_by_the_disk() -> None:
    blocks = (Block(10, 1.0),) * 4
    line = simulate(Residency(4, (), (), 2, 2), blocks, machine(read=1, copy=10), 2)
    assert line.seconds == 8 * 10 + 1 + 1
    assert line.stall_s(Queue.READ) == 0


def test_one_buffer_of_each_works_one_after_another() -> None:
    blocks = (Block(10, 3.0),) * 2
    line = simulate(Residency(2, (), (), 1, 1), blocks, machine(read=10, copy=5), 1)
    # read 0-1, copy 1-3, compute 3-6; the next read runs at 3, its copy waits for the slot
    assert [(span.start_s, span.end_s) for span in line.spans] == [
        (0, 1), (1, 3), (3, 6), (3, 4), (6, 8), (8, 11)
    ]  # fmt: skip
    assert [span.idle_s for span in line.spans] == [0, 1, 3, 2, 3, 2]


def test_the_next_cycle_is_read_while_this_one_computes() -> None:
    blocks = (Block(10, 10.0),) * 3
    line = simulate(Residency(3, (), (), 2, 2), blocks, machine(read=10, copy=10), 2)
    first_again = next(s for s in line.spans if isinstance(s.op, Read) and s.op.visit == 3)
    last_compute = next(s for s in line.spans if s.op.ref == (Queue.COMPUTE, 2))
    assert first_again.end_s < last_compute.start_s


def test_residents_come_in_the_first_pass() -> None:
    blocks = (Block(10, 1.0), Block(20, 1.0), Block(30, 1.0))
    line = simulate(Residency(3, (0,), (1,), 1, 1), blocks, machine(read=10, copy=5), 2)
    assert (line.opening_s, line.spans[0].start_s) == (0, 0)
    assert (line.device_bytes, line.host_bytes) == (10 + 30, 20 + 30)
    # reads 0-1, 1-3 and 3-6; copies 1-3, 3-7 and, the slot being free at 8, 8-14; later no more
    # than block 1 from its place and block 2 from disk
    assert [span.end_s for span in line.spans[:9]] == [1, 3, 4, 3, 7, 8, 6, 14, 15]
    assert [span.op.block for span in line.spans[9:]] == [0, 1, 1, 2, 2, 2]


def test_residents_of_the_device_come_first_where_there_is_no_slab() -> None:
    blocks = (Block(10, 1.0), Block(20, 1.0))
    line = simulate(Residency(2, (0,), (1,), 1, 0), blocks, machine(read=10, copy=5), 1)
    assert line.opening_s == 10 / 10 + 10 / 5 == line.spans[0].start_s
    assert (line.device_bytes, line.host_bytes) == (10 + 20, 20)


@pytest.mark.parametrize(("device", "host"), [(39, ROOM), (ROOM, 49)])
def test_the_caps_are_hard(device: int, host: int) -> None:
    blocks = (Block(10, 1.0), Block(20, 1.0), Block(30, 1.0))
    residency = Residency(3, (0,), (1,), 1, 1)
    simulate(residency, blocks, machine(device=40, host=50), 1)
    with pytest.raises(LedgerOverflow):
        simulate(residency, blocks, machine(device=device, host=host), 1)


def test_illegal_values() -> None:
    with pytest.raises(UsageError, match="positive rates"):
        machine(copy=0)
    with pytest.raises(UsageError, match="expected 2, found 1"):
        simulate(Residency(2, (0, 1)), (Block(1, 1.0),), machine(), 1)
    with pytest.raises(UsageError, match="passes"):
        simulate(Residency(1, (0,)), (Block(1, 1.0),), machine(), 0)


@settings(max_examples=100, deadline=None)
@given(
    residencies(),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=8, max_size=8),
    st.floats(0.5, 20),
    st.floats(0.5, 20),
)
def test_it_is_a_possible_history(
    residency: Residency,
    passes: int,
    numbers: list[tuple[int, float]],
    read: float,
    copy: float,
) -> None:
    blocks = tuple(Block(*pair) for pair in numbers[: residency.n_blocks])
    line = simulate(residency, blocks, machine(read, copy), passes)
    ends = {span.op.ref: span.end_s for span in line.spans}
    for span in line.spans:
        assert all(ends[ref] <= span.start_s for ref in span.op.after)
    for queue in Queue:
        spans = [span for span in line.spans if span.op.ref.queue is queue]
        assert all(a.end_s <= b.start_s for a, b in zip(spans, spans[1:], strict=False))
        assert line.busy_s(queue) <= line.seconds - line.opening_s + 1e-9
    assert line.seconds >= max(line.busy_s(queue) for queue in Queue)


@settings(max_examples=50, deadline=None)
@given(residencies(), st.integers(1, 3))
def test_larger_rings_are_never_slower(residency: Residency, passes: int) -> None:
    blocks = tuple(Block(10 + i, 1.0 + i % 3) for i in range(residency.n_blocks))
    more = Residency(
        residency.n_blocks,
        residency.device_resident,
        residency.host_resident,
        residency.device_slots + 1,
        residency.staging_buffers + 1,
    )
    slow = simulate(residency, blocks, machine(7, 9), passes)
    fast = simulate(more, blocks, machine(7, 9), passes)
    assert fast.seconds <= slow.seconds + 1e-9
