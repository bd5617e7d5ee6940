"""SIGKILL: the job is resumed from where it was, and its video is the same."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from penstock.engine.engine import Engine
from tests.engine.run.test_resume import STEPS, a_request, an_engine
from tests.faults.child import Attempt, Task, assert_at_most_one_step_redone
from tests.faults.film import frames_sha

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def engine(i2v_folder: Path) -> Iterator[Engine]:
    with an_engine(i2v_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def sha(engine: Engine, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The frames of an uninterrupted job."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    engine.submit(a_request(picture), output).result()
    return frames_sha(output)


def a_task(engine: Engine, picture: Path | None, folder: Path, steps: int = STEPS) -> Task:
    folder.mkdir()
    return Task(engine, a_request(picture, steps=steps), folder)


def kill_at_failpoints(
    engine: Engine,
    picture: Path | None,
    sha: str,
    tmp_path: Path,
    count: int | None = None,
    steps: int = STEPS,
) -> tuple[int, int]:
    """Kill a job at ``count`` failpoints spread over its life, or at all, and finish it each time.

    Returns:
        How many failpoints there are, and how many steps were done twice.
    """
    total = a_task(engine, picture, tmp_path / "count", steps).attempt().failpoints
    count = count or total
    points = sorted({1 + index * (total - 1) // (count - 1) for index in range(count)})
    redone = 0
    for at in points:
        task = a_task(engine, picture, tmp_path / f"at{at}", steps)
        killed = task.attempt(kill_at=at)
        assert killed.was_killed or at >= total - 2  # the writer's thread makes the count vary
        redone += finish(task, [killed], sha)
    return total, redone


def kill_at_moments(
    engine: Engine, picture: Path, sha: str, tmp_path: Path, *, jobs: int, kills: int, seed: int
) -> tuple[int, int]:
    """Kill each of ``jobs`` jobs ``kills`` times in a row at random moments, then finish it.

    Returns:
        How many kills hit a living job, and how many steps were done twice.
    """
    chance = random.Random(seed)
    total = a_task(engine, picture, tmp_path / "count").attempt().failpoints
    hit = redone = 0
    for number in range(jobs):
        task = a_task(engine, picture, tmp_path / f"job{number}")
        attempts: list[Attempt] = []
        while len(attempts) < kills and not (attempts and not attempts[-1].was_killed):
            attempts.append(task.attempt(kill_after=chance.randrange(total)))
            if _is_done(task):  # killed between the job's end and the process's
                break
        hit += sum(attempt.was_killed for attempt in attempts)
        redone += finish(task, attempts, sha)
    return hit, redone


def finish(task: Task, attempts: Iterable[Attempt], sha: str) -> int:
    """Let the job end, compare its video, and return how many steps were done twice."""
    attempts = list(attempts)
    if attempts[-1].was_killed and not _is_done(task):
        attempts.append(task.attempt())
    assert not any(path.name.endswith(".new") for path in task.job.iterdir())
    assert frames_sha(task.output) == sha
    with_steps = [attempt for attempt in attempts if attempt.steps]
    redone = sum(map(assert_at_most_one_step_redone, with_steps, with_steps[1:]))
    shutil.rmtree(task.folder)
    return redone


def _is_done(task: Task) -> bool:
    from penstock.engine.store.journal import JOB_FILES, read_record

    exists = any((task.job / name).exists() for name in JOB_FILES)
    return exists and read_record(task.job).state == "done"


def test_sigkill_at_failpoints(engine: Engine, picture: Path, sha: str, tmp_path: Path) -> None:
    total, _ = kill_at_failpoints(engine, picture, sha, tmp_path, count=6)
    assert total >= 100


def test_sigkill_at_random_moments(engine: Engine, picture: Path, sha: str, tmp_path: Path) -> None:
    hit, _ = kill_at_moments(engine, picture, sha, tmp_path, jobs=2, kills=3, seed=1)
    assert hit >= 1
