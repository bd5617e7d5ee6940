"""Nothing grows while a job runs, and what it tells step by step adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.soak import RSS_GROWTH_BYTES, Sample, Soak, soak
from penstock.engine.run.report import PhaseReport


def test_forty_steps_under_tight_budgets(t2v_folder: Path) -> None:
    found = soak(t2v_folder, 40)
    assert [sample.step for sample in found.samples] == list(range(1, 41))
    assert found.report.read_bytes > 15 * found.model_bytes
    assert found.grown == {}
    check_steps(found)


def check_steps(found: Soak) -> None:
    """The steps' own figures are those of the phase, but for what was read ahead of the first."""
    steps = found.report.steps
    assert len(steps) == 40 and all(step.seconds > 0 for step in steps)
    visited = {step.flow.device_to_compute.nbytes for step in steps}
    assert visited == {found.report.flow.device_to_compute.nbytes // 40}
    read = sum(step.flow.disk_to_host.nbytes for step in steps)
    assert 0 <= found.report.read_bytes - read < found.model_bytes
    assert found.report.flow.device_to_compute.busy_s > 0


SAMPLE = Sample(1, 1 << 30, 5, 5, 9, 4)
REPORT = PhaseReport("denoise", 1.0, 20, "step", 1, 1, 1, 1, 1, 1, 0.0)


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("rss_bytes", RSS_GROWTH_BYTES),
        ("vram_bytes", 1),
        ("ram_bytes", 1),
        ("descriptors", 1),
        ("threads", 1),
    ],
)
def test_growth_is_seen(what: str, by: int) -> None:
    grown = replace(SAMPLE, **{what: getattr(SAMPLE, what) + by + 1})
    steady = Soak(REPORT, 0, (SAMPLE,) * 20)
    assert steady.grown == {}
    leaking = Soak(REPORT, 0, (SAMPLE,) * 10 + (grown,) * 10)
    assert leaking.grown == {what: by + 1}
