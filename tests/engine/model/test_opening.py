"""A job remembers how its model was asked for: parts given one by one, or the name of a hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.engine import Engine
from penstock.engine.files import locate as places
from penstock.engine.files.locate import Files
from penstock.engine.model.opening import Opening
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.events import Progress
from penstock.engine.run.jobs import opening_of
from penstock.errors import JournalError
from tests.engine import golden
from tests.engine.running import stop_after_a_step
from tests.engine.test_doors import single_files

REQUEST = GenerationRequest(
    prompt="a cat", negative_prompt="", width=32, height=32, frames=5, steps=3, seed=3,
    guidance_scale=1.0,
)  # fmt: skip
BUDGETS = {"device": "cpu", "vram": "256MiB", "ram": "256MiB"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


@pytest.fixture(scope="module")
def expected(model: Path) -> Tensor:
    with Engine.open(model, **BUDGETS) as engine:
        return engine.submit(REQUEST).result().latents


def stopped_then_resumed(folder: Path, model: str | Path | None, files: Files | None) -> Tensor:
    """The latents of a job that was stopped after a step and continued from its record alone."""
    with Engine.open(model, files=files, **BUDGETS) as engine:
        stop_after_a_step(engine, REQUEST, folder)
    opening = opening_of(folder)
    with Engine.reopen(opening) as engine:
        return engine.resume(folder).result().latents


def test_a_job_of_single_files_is_resumed(tmp_path: Path, model: Path, expected: Tensor) -> None:
    files = single_files(model, tmp_path)
    assert torch.equal(stopped_then_resumed(tmp_path / "job", None, files), expected)


def test_a_job_of_a_model_with_another_transformer_is_resumed(
    tmp_path: Path, model: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is given by a relative path, and the job resumed from elsewhere."""
    single_files(model, tmp_path, "lightx2v int8")
    monkeypatch.chdir(tmp_path)
    files = Files(transformer=Path("transformer.safetensors"))
    with Engine.open(model, files=files, **BUDGETS) as engine:
        other = engine.submit(REQUEST).result().latents
        job = engine.submit(REQUEST, job_dir=tmp_path / "job")
        for event in job.events():
            if isinstance(event, Progress) and event.phase == "denoise":
                job.cancel()
    monkeypatch.chdir("/")
    opening = opening_of(tmp_path / "job")
    with Engine.reopen(opening) as engine:
        found = engine.resume(tmp_path / "job").result().latents
    assert torch.equal(found, other)
    assert not torch.equal(found, expected)


def test_a_job_of_a_hub_id_is_resumed(
    tmp_path: Path, model: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(model, tmp_path / "snapshot")
    asked: list[tuple[str, bool]] = []

    def fetch(name: str, offline: bool) -> Path:
        asked.append((name, offline))
        return snapshot

    monkeypatch.setattr(places, "hub_snapshot", fetch)
    found = stopped_then_resumed(tmp_path / "job", "someone/wan-tiny@v1", None)
    assert torch.equal(found, expected)
    assert asked == [("someone/wan-tiny@v1", True)] * 2


@pytest.mark.parametrize(
    "values",
    [{}, {"model": 3}, {"model": None, "files": {"vae": "x"}}, {"model": "m", "files": {"x": "y"}},
     {"files": {"transformer": 1}}],
)  # fmt: skip
def test_a_record_that_names_no_model_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(JournalError, match="names no model"):
        Opening.from_values(values)
