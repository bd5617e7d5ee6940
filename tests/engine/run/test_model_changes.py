"""A model file that is truncated, replaced or touched under a job: a named error, the job kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine import engine as engine_module
from penstock.engine.run.events import Event, PhaseStarted, Progress
from penstock.engine.store.journal import read_record
from penstock.errors import CheckpointChanged, CheckpointError
from tests.engine.run.test_resume import a_request, an_engine


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


CHANGES = [truncate, empty, replace, touch, overwrite, Path.unlink]

MOMENTS: list[tuple[str, str, Callable[[Event], bool]]] = [
    ("text_encoder", "text", lambda e: isinstance(e, PhaseStarted) and e.phase == "text"),
    ("transformer", "context", lambda e: isinstance(e, PhaseStarted) and e.phase == "context"),
    ("transformer", "step 2", lambda e: isinstance(e, Progress) and e.step == 2 and _steps(e)),
    ("vae", "decode", lambda e: isinstance(e, PhaseStarted) and e.phase == "decode"),
]


def _steps(event: Progress) -> bool:
    return event.phase == "denoise"


def at_event(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[Event], bool], act: Callable[[], object]
) -> None:
    """Let ``act`` run on the job's own thread at the first event for which ``when`` holds."""
    original, acted = engine_module.run, []

    def run(work: Any, listener: Callable[[Event], None], cancelled: Any) -> Any:
        def tap(event: Event) -> None:
            if not acted and when(event):
                acted.append(act())
            listener(event)

        return original(work, tap, cancelled)

    monkeypatch.setattr(engine_module, "run", run)


@pytest.fixture(scope="module")
def latents(t2v_folder: Path) -> torch.Tensor:
    with an_engine(t2v_folder) as engine:
        return engine.submit(a_request(None)).result().latents


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("part", "moment", "when"), MOMENTS, ids=lambda v: str(v)[:12])
def test_a_changed_model_file_is_a_named_error_and_the_job_is_kept(
    t2v_folder: Path,
    latents: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    part: str,
    moment: str,
    when: Callable[[Event], bool],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(t2v_folder, folder)
    path = next((folder / part).glob("*.safetensors"))
    at_event(monkeypatch, when, lambda: change(path))
    with an_engine(folder) as engine:
        job = engine.submit(a_request(None), job_dir=tmp_path / "job")
        expected = CheckpointError if change is Path.unlink else CheckpointChanged
        with pytest.raises(expected, match=f"{path.name}.*penstock resume"):
            job.result()
    record = read_record(tmp_path / "job")
    assert record.state == "failed" and record.facts["error"].startswith("checkpoint")
    path.unlink(missing_ok=True)
    shutil.copyfile(t2v_folder / part / path.name, path)
    with an_engine(folder) as engine:
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, latents)
