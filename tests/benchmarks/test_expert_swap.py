"""The swap of two transformers costs little of a job, on the simulated machine."""

from __future__ import annotations

from benchmarks import render
from benchmarks.expert_swap import CARDS, JOBS, rows


def test_a_job_with_a_swap_takes_what_its_bound_says() -> None:
    """The least room for both in RAM, and the fastest card, where a swap weighs most."""
    found = list(rows((CARDS[0], CARDS[-1])))
    assert len(found) == 2 * len(JOBS)
    kept = render.read_results(render.RESULTS)["expert_swap_simulated"]
    assert len(kept) == len(CARDS) * len(JOBS)
    for row in found:
        assert row["of_bound"] >= 0.95, row
        assert row in kept
    ample = [row for row in found if row["card"] == CARDS[-1][0]]
    for row in ample:  # of each transformer every byte comes from the disk once
        assert row["read_ahead"]
        assert all(nbytes <= row["expert_gib"] for nbytes in row["read_gib"])
