"""A kill at every call of every network of pipelines that diffusers runs, before and after its
record is on the disk: each time the bits of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.attach.resuming import WORDS, Task, equal, saved
from tests.engine.attach.test_resume_calls import CASES, MORE
from tests.versions import DIFFUSERS_0_36, TRANSFORMERS_4

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(TRANSFORMERS_4 or DIFFUSERS_0_36, reason="its parts are newer"),
]


@pytest.mark.parametrize(("name", "scheduler"), [case[:2] for case in (*CASES, *MORE)])
def test_a_kill_at_every_call(name: str, scheduler: str | None, tmp_path: Path) -> None:
    task = Task(saved(name, tmp_path / "model", scheduler), WORDS[name])
    wanted, plain = task.made()
    kept = task.job.plan.kept
    assert kept is not None and plain.computed_calls == 0
    lost = 0
    for at in range(kept.calls):
        for settled in (True, False):
            folder = tmp_path / f"{at}-{settled}"
            task.killed(folder, at, settled=settled)
            given, report = task.resumed(folder)
            assert equal(given, wanted)
            assert report.answered_calls in ((at + 1,) if settled else (at, at + 1))
            lost += at + 1 - report.answered_calls
    print(f"{name}: killed at {kept.calls} calls twice, {lost} calls were computed again")
