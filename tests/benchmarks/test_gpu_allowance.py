"""The time that a card's tests have."""

from __future__ import annotations

from tests.gpu.conftest import Allowance


def test_what_begins_in_time_runs_and_nothing_after() -> None:
    moments = iter([100.0, 100.0, 279.9, 280.0, 500.0])
    allowed = Allowance(180.0, lambda: next(moments))
    assert [allowed.is_spent() for _ in range(4)] == [False, False, True, True]
