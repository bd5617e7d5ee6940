"""Figures of a stream: sums and differences are those of their fields."""

from __future__ import annotations

from penstock.offload.stats import Edge, Flow, StreamStats


def test_the_flow_between_two_moments() -> None:
    stats = StreamStats(read_bytes=10, copied_bytes=4, read_s=2.0, staging_wait_s=0.5)
    before = stats.flow()
    stats.add("read_bytes", 30)
    stats.add("visited_bytes", 7)
    stats.pageable_bytes = 3
    for name in ("read_s", "disk_wait_s", "slot_wait_s", "compute_s", "compute_wait_s"):
        stats.add(name, 3.0)
    passed = stats.flow() - before
    assert passed == Flow(
        Edge(30, 3.0, 0.0, 0.0), Edge(0, 0.0, 3.0, 3.0), Edge(7, 3.0, 3.0, 0.0), 0, 3
    )
    assert before + passed == stats.flow()
    assert sum([before, passed], Flow()) == stats.flow()


def test_rates_are_those_of_working_seconds() -> None:
    assert Edge(30, busy_s=3.0, starved_s=9.0).bytes_per_s == 10.0
    assert Edge(30).bytes_per_s == 0.0
