"""The ledger: nothing passes the cap, nothing is lost, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import LedgerOverflow, UsageError
from penstock.offload.ledger import ByteLedger


def test_reserve_release_and_peak() -> None:
    ledger = ByteLedger("VRAM", 100)
    first = ledger.reserve("slots", 60)
    with ledger.reserve("work", 40) as second:
        assert (ledger.used, ledger.free, ledger.peak) == (100, 0, 100)
        assert ledger.by_label() == {"slots": 60, "work": 40}
        assert (second.label, second.nbytes) == ("work", 40)
    assert ledger.used == 60
    first.close()
    first.close()
    assert (ledger.used, ledger.peak, ledger.by_label()) == (0, 100, {})
    with ledger.reserve("work", 7):
        ledger.reset_peak()
        assert ledger.peak == 7


def test_one_label_may_be_reserved_twice() -> None:
    ledger = ByteLedger("RAM", 100)
    first, second = ledger.reserve("staging buffer", 10), ledger.reserve("staging buffer", 20)
    assert ledger.by_label() == {"staging buffer": 30}
    first.close()
    assert ledger.by_label() == {"staging buffer": 20}
    second.close()


def test_overflow_names_need_free_and_holders_and_takes_nothing() -> None:
    ledger = ByteLedger("VRAM", 100)
    with ledger.reserve("small", 10), ledger.reserve("large", 80):
        with pytest.raises(LedgerOverflow) as caught:
            ledger.reserve("block slots", 11)
        assert ledger.used == 90 == ledger.peak
    text = str(caught.value)
    for part in ("block slots", "VRAM", "11 bytes", "found 10 (", "large 80 B, small 10 B"):
        assert part in text
    with pytest.raises(LedgerOverflow, match="held: nothing"):
        ledger.reserve("all and one", 101)
    ledger.reserve("all", 100).close()


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_is_positive(cap: int) -> None:
    with pytest.raises(UsageError, match="RAM budget must be positive"):
        ByteLedger("RAM", cap)


def test_a_reservation_is_not_negative() -> None:
    with pytest.raises(UsageError, match="cannot be negative"):
        ByteLedger("RAM", 1).reserve("work", -1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=40))
@example([(True, 0), (True, 0), (False, 0), (False, 0)])
def test_used_is_always_the_sum_of_what_is_held(steps: list[tuple[bool, int]]) -> None:
    ledger, held, peak = ByteLedger("RAM", 100), [], 0
    for take, size in steps:
        if take and sum(r.nbytes for r in held) + size <= 100:
            held.append(ledger.reserve(f"label {size % 3}", size))
        elif take:
            with pytest.raises(LedgerOverflow):
                ledger.reserve("too much", size)
        elif held:
            held.pop(size % len(held)).close()
        peak = max(peak, sum(r.nbytes for r in held))
        assert ledger.used == sum(r.nbytes for r in held) == sum(ledger.by_label().values())
        assert ledger.peak == peak <= 100


def test_many_threads_lose_no_byte() -> None:
    ledger = ByteLedger("RAM", 64)

    def work(seed: int) -> int:
        refused = 0
        for step in range(300):
            try:
                with ledger.reserve(f"label {seed}", (seed * step) % 17):
                    assert ledger.used <= 64
            except LedgerOverflow:
                refused += 1
        return refused

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert ledger.used == 0 and ledger.by_label() == {}
    assert 16 <= ledger.peak <= 64
