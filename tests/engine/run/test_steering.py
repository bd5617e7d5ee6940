"""``on_step``: tools that look on, steer or stop; and what a resume makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.media.video import read_metadata
from penstock.engine.run.events import Notice
from penstock.engine.run.jobs import describe
from penstock.engine.run.pipeline import STEERED
from penstock.engine.run.report import JobResult
from penstock.errors import FingerprintMismatch, JobCancelled, NonFinite, UsageError
from tests.engine.running import a_request, an_engine

SHAPE = (1, 16, 2, 4, 6)


@pytest.fixture(scope="module")
def engine(t2v_folder: Path) -> Iterator[Engine]:
    with an_engine(t2v_folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(engine: Engine) -> JobResult:
    return engine.submit(a_request()).result()


@pytest.fixture(scope="module")
def steered(engine: Engine) -> JobResult:
    return engine.submit(a_request(), on_step=shaded).result()


def shaded(step: int, latents: Tensor) -> Tensor | None:
    """Steers in steps 1 and 2 of 3."""
    return latents * (1 - 0.1 * step) if step < 3 else None


def test_a_tool_that_looks_on_sees_every_step_and_changes_nothing(
    engine: Engine, plain: JobResult
) -> None:
    seen: list[tuple[int, Tensor]] = []

    def look(step: int, latents: Tensor) -> None:
        seen.append((step, latents.clone()))
        latents.zero_()  # a copy: it may do what it likes with it

    result = engine.submit(a_request(), on_step=look).result()
    assert [step for step, _ in seen] == [1, 2, 3]
    for _, latents in seen:
        assert (latents.shape, latents.dtype, latents.device.type) == (
            SHAPE, torch.float32, "cpu",
        )  # fmt: skip
    assert torch.equal(seen[-1][1], plain.latents)
    assert torch.equal(result.latents, plain.latents)
    assert torch.equal(result.video, plain.video)
    assert not result.report.steered


def test_what_is_returned_is_gone_on_with_and_the_report_says_so(
    engine: Engine, plain: JobResult, steered: JobResult, tmp_path: Path
) -> None:
    assert not torch.equal(steered.latents, plain.latents)
    assert steered.report.steered
    assert steered.report.notices == (STEERED,)
    last: list[Tensor] = []

    def replace_the_last(step: int, latents: Tensor) -> Tensor | None:
        last.append(torch.full_like(latents, 0.5).double())  # any real type
        return last[-1] if step == 3 else None

    job = engine.submit(a_request(), tmp_path / "a.mp4", on_step=replace_the_last)
    result = job.result()
    assert torch.equal(result.latents, torch.full(SHAPE, 0.5))
    last[-1].zero_()  # what it keeps of it is its own
    assert torch.equal(result.latents, torch.full(SHAPE, 0.5))
    assert read_metadata(tmp_path / "a.mp4")["steered"] is True
    assert Notice(STEERED) in list(job.events())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 16, 2, 4, 5), r"shape \(1, 16, 2, 4, 6\), found torch.float32 of shape"),
        (torch.zeros(SHAPE, dtype=torch.complex64), "found torch.complex64"),
        ("latents", "found str"),
    ],
    ids=["shape", "complex", "type"],
)
def test_what_cannot_be_latents_is_refused(engine: Engine, wrong: Any, message: str) -> None:
    job = engine.submit(a_request(), on_step=lambda *_: wrong)
    with pytest.raises(UsageError, match=f"on_step returned after step 1.*{message}"):
        job.result()


def test_nan_is_refused(engine: Engine) -> None:
    job = engine.submit(a_request(), on_step=lambda step, latents: latents / 0)
    with pytest.raises(NonFinite, match="after step 1 of 3"):
        job.result()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_preview_every_counts_steps(engine: Engine, every: Any) -> None:
    with pytest.raises(UsageError, match="preview_every counts steps"):
        engine.submit(a_request(), preview_every=every)


def test_on_step_must_be_callable(engine: Engine) -> None:
    with pytest.raises(UsageError, match="on_step.*found str"):
        engine.submit(a_request(), on_step="no function")  # type: ignore[arg-type]


class ToolError(Exception):
    """A tool's own."""


@pytest.mark.parametrize("error", [ToolError("enough"), JobCancelled("enough")])
def test_what_it_raises_ends_the_job_as_itself_and_the_step_is_done_again(
    engine: Engine, plain: JobResult, tmp_path: Path, error: Exception
) -> None:
    def stop(step: int, latents: Tensor) -> None:
        if step == 2:
            raise error

    job = engine.submit(a_request(), job_dir=tmp_path / "job", on_step=stop)
    with pytest.raises(type(error), match="enough") as caught:
        job.result()
    assert caught.value is error
    info = describe(tmp_path / "job")
    assert (info.state, info.step) == (
        "stopped" if isinstance(error, JobCancelled) else "failed", 1,
    )  # fmt: skip
    result = engine.resume(tmp_path / "job").result()
    assert torch.equal(result.video, plain.video)


def _stopped(engine: Engine, folder: Path, at: int) -> None:
    """A steered job that was stopped after ``at`` steps."""

    def steer_and_stop(step: int, latents: Tensor) -> Tensor | None:
        if step == at + 1:
            raise JobCancelled("stopped by the test")
        return shaded(step, latents)

    with pytest.raises(JobCancelled):
        engine.submit(a_request(), job_dir=folder, on_step=steer_and_stop).result()


@pytest.mark.parametrize("at", [1, 2])
def test_a_steered_job_goes_on_bit_for_bit_with_its_tool(
    engine: Engine, steered: JobResult, tmp_path: Path, at: int
) -> None:
    _stopped(engine, tmp_path / "job", at)
    result = engine.resume(tmp_path / "job", on_step=shaded).result()
    assert torch.equal(result.latents, steered.latents)
    assert result.report.steered


def test_a_steered_job_does_not_go_on_without_its_tool_unasked(
    engine: Engine, steered: JobResult, tmp_path: Path
) -> None:
    _stopped(engine, tmp_path / "job", 1)
    with pytest.raises(FingerprintMismatch, match="steered True, found steered False"):
        engine.resume(tmp_path / "job")
    result = engine.resume(tmp_path / "job", allow_nonidentical=True).result()
    assert not torch.equal(result.latents, steered.latents)
    assert result.report.steered
    assert "the result will not be identical: steered was True and is False" in (
        result.report.notices
    )


def test_a_steered_job_whose_steps_are_done_needs_its_tool_no_more(
    engine: Engine, steered: JobResult, tmp_path: Path
) -> None:
    job = engine.submit(a_request(), job_dir=tmp_path / "job", on_step=shaded)
    for event in job.events():
        if getattr(event, "phase", None) == "decode":
            job.cancel()
            break
    with pytest.raises(JobCancelled):
        job.result()
    result = engine.resume(tmp_path / "job").result()
    assert torch.equal(result.video, steered.video)
    assert result.report.steered
