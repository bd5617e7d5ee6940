"""The nodes with their worker, and the model in the box."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.comfy.desk import hand_over, reserve
from penstock.comfy.pictures import drop, mapped, picture_file
from penstock.engine.engine import Engine
from penstock.engine.media.video import read_frames
from penstock.engine.request.demo import MINI, demo_picture
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.jobs import list_jobs
from penstock.errors import StorageError
from tests.comfyui.fake import ComfyUI

BUDGETS = {"vram": "256MiB", "ram": "512MiB", "device": "cpu"}
SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 3}
MODEL = {"model": str(MINI), "files": {}, "loras": []}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(demo_picture()).convert("RGB")))
    return pixels[None].float() / 255


@pytest.fixture(scope="module", autouse=True)
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the worker, which outlives a test, keeps its jobs."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSTOCK_DATA_DIR", str(folder))
        yield folder / "jobs"


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    settings = Settings(
        prompt="it moves", image=demo_picture(), size="32x32", frames=5, steps=3, seed=3
    )
    with Engine.open(MINI, **BUDGETS) as engine:
        return engine.submit(resolve(settings, engine.model)).result().video


def asked(picture: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"prompt": "it moves", "seed": 3, "start_image": picture, **SMALL, **BUDGETS, **more}


def interrupts(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, when: Callable[[], bool]) -> None:
    """Let the user interrupt once ``when`` holds."""
    real, done = comfyui.memory.throw_exception_if_processing_interrupted, []

    def throw() -> None:
        if not done and when():
            done.append(True)
            comfyui.memory.interrupt = True
        real()

    monkeypatch.setattr(comfyui.memory, "throw_exception_if_processing_interrupted", throw)


def test_a_plan_loads_nothing_and_says_whether_it_fits(
    nodes: ModuleType, comfyui: ComfyUI, picture: torch.Tensor
) -> None:
    fits = nodes.PenstockPlan.execute(MODEL, **asked(picture, width=0, height=0, frames=17))
    text, good = fits.args
    assert good and text.startswith("plan for CPU: it fits") and "denoise" in text
    assert "17 frames as fp32 are 816.0 KiB" in text and fits.ui == {"text": (text,)}
    assert comfyui.shown.texts[-1] == ("3", text)
    text, good = nodes.PenstockPlan.execute(MODEL, **asked(picture, vram="1MiB")).args
    assert not good and text.startswith("it does not fit") and "VRAM" in text


def test_a_video_and_its_frames(
    nodes: ModuleType,
    comfyui: ComfyUI,
    picture: torch.Tensor,
    expected: torch.Tensor,
    jobs: Path,
    tmp_path: Path,
) -> None:
    comfyui.shown.progress.clear()
    images, video, report = nodes.PenstockGenerate.execute(
        MODEL, images=True, **asked(picture)
    ).args
    assert images.dtype == torch.float32 and torch.equal(images, expected.float() / 255)
    settings = Settings(
        prompt="it moves", image=demo_picture(), size="32x32", frames=5, steps=3, seed=3
    )
    with Engine.open(MINI, **BUDGETS) as engine:
        engine.submit(resolve(settings, engine.model), tmp_path / "e.mp4").result()
    theirs = list(read_frames(Path(video.get_stream_source())))
    assert np.array_equal(theirs, list(read_frames(tmp_path / "e.mp4")))
    assert report.startswith("took ") and "plan for CPU" in report
    shown = comfyui.shown
    values = [value for value, total, _ in shown.progress if total == 100]
    assert values == sorted(values) and values
    previews = [each for _, _, each in shown.progress if each is not None]
    assert len(previews) == 3 and previews[0][0] == "JPEG"
    assert any("denoise: step 2 of 3" in text for node, text in shown.texts if node == "3")
    assert list_jobs(jobs) == []
    left = {path.suffix for path in (comfyui.folders.temp / "penstock").iterdir()}
    assert left == {".mp4", ".png"}  # what the frames lay in has no name any more


def test_the_video_alone_makes_no_frames_and_says_so_where_they_are_used(
    nodes: ModuleType, picture: torch.Tensor
) -> None:
    images, video, _ = nodes.PenstockGenerate.execute(MODEL, **asked(picture)).args
    assert "VIDEO and IMAGE" in images.message
    again, _, _ = nodes.PenstockGenerate.execute(
        MODEL, images=True, after=video, prompt="on", seed=1, frames=5, steps=2, **BUDGETS
    ).args
    assert again.shape == (5, 32, 32, 3)  # the next one starts where the other ended


def test_the_worker_stays_from_job_to_job_and_goes_when_models_are_unloaded(
    nodes: ModuleType, comfyui: ComfyUI, picture: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui.memory, "unload_all_models", comfyui.memory.unload_all_models)
    asyncio.run(nodes.comfy_entrypoint())
    before, freed = nodes.WORKER.pid, comfyui.memory.freed
    assert before is not None
    nodes.PenstockGenerate.execute(MODEL, **asked(picture, steps=1))
    assert nodes.WORKER.pid == before
    assert comfyui.memory.freed == freed + 1  # ComfyUI's own models have made room for it
    comfyui.memory.unload_all_models()
    assert nodes.WORKER.pid is None


def test_an_interrupt_keeps_the_job_for_the_same_again_and_for_resume(
    nodes: ModuleType,
    comfyui: ComfyUI,
    picture: torch.Tensor,
    expected: torch.Tensor,
    jobs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def previews() -> int:
        return sum(each is not None for _, _, each in comfyui.shown.progress)

    for again in (
        lambda: nodes.PenstockGenerate.execute(MODEL, images=True, **asked(picture)),
        lambda: nodes.PenstockResume.execute(nodes.NEWEST, images=True, **BUDGETS),
    ):
        comfyui.shown.progress.clear()
        with monkeypatch.context() as patch:
            interrupts(comfyui, patch, lambda: previews() >= 1)
            with pytest.raises(comfyui.memory.InterruptProcessingException):
                nodes.PenstockGenerate.execute(MODEL, **asked(picture))
        (job,) = list_jobs(jobs)
        assert job.unfinished and 0 < job.step < 3
        assert any(job.name in text for _, text in comfyui.shown.texts)
        options = nodes.PenstockResume.info()["input"]["required"]["job"][1]["options"]
        assert options == [nodes.NEWEST, job.name]
        assert nodes.PenstockResume.fingerprint_inputs(nodes.NEWEST) == [job.name]
        assert torch.equal(again().args[0], expected.float() / 255)
        assert list_jobs(jobs) == []
    assert nodes.PenstockResume.validate_inputs("one that is done") is True
    assert nodes.PenstockResume.fingerprint_inputs("one that is done") == "one that is done"


def test_errors_are_the_nodes_and_say_what_to_do(
    nodes: ModuleType, comfyui: ComfyUI, picture: torch.Tensor
) -> None:
    with pytest.raises(nodes.PenstockFailed, match="The nearest legal number of frames is 5"):
        nodes.PenstockGenerate.execute(MODEL, **asked(picture, frames=6))
    with pytest.raises(nodes.PenstockFailed, match="VRAM"):
        nodes.PenstockGenerate.execute(MODEL, images=True, **asked(picture, vram="1MiB"))
    broken = {**MODEL, "loras": [["l", "strong"]]}
    with pytest.raises(nodes.PenstockFailed, match="names no LoRAs"):
        nodes.PenstockGenerate.execute(broken, **asked(picture))
    with pytest.raises(nodes.PenstockFailed, match="ComfyUI's console says what"):
        nodes._done(nodes.NodeOrder("x", "plan", MODEL, {"no": "option"}), nodes.Watch(None))
    with pytest.raises(nodes.PenstockFailed, match="no unfinished job"):
        nodes.PenstockResume.execute(nodes.NEWEST)


def test_a_worker_that_is_killed_is_an_error_of_the_node(
    nodes: ModuleType,
    comfyui: ComfyUI,
    picture: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill(*_: Any) -> None:
        os.kill(nodes.WORKER.pid, 9)

    monkeypatch.setattr(nodes.Watch, "_progress", kill)
    with pytest.raises(nodes.PenstockFailed, match="signal 9.*queue the same again.*RAM budget"):
        nodes.PenstockGenerate.execute(MODEL, **asked(picture))
    assert nodes.WORKER.pid is None


def test_frames_are_handed_over_without_a_copy(tmp_path: Path) -> None:
    video = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
    path = tmp_path / "f"
    reserve(path, video.shape)
    assert path.stat().st_size == 4 * video.numel()
    hand_over(video, path)
    frames = mapped(path, video.shape)
    assert torch.equal(frames, video.float() / 255)
    assert _mapping_of(frames) == str(path)
    before = path.read_bytes()
    frames.zero_()  # of this process alone
    assert path.read_bytes() == before
    drop(path)
    drop(path)
    assert not path.exists() and frames.sum() == 0


def _mapping_of(tensor: torch.Tensor) -> str | None:
    """The file that a tensor's memory is of, where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell of mappings")
    for line in maps.read_text().splitlines():
        place, *_, name = line.split()
        low, high = (int(word, 16) for word in place.split("-"))
        if low <= tensor.data_ptr() < high:
            return name
    return None


def test_frames_that_do_not_fit_the_disk_are_refused_before_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="ask for the video alone"):
        reserve(tmp_path / "no" / "f", (1, 2, 2, 3))
    monkeypatch.delattr(os, "posix_fallocate")
    full = SimpleNamespace(free=47)
    monkeypatch.setattr("shutil.disk_usage", lambda place: full)
    with pytest.raises(StorageError, match="No space left"):
        reserve(tmp_path / "f", (1, 2, 2, 3))
    assert not (tmp_path / "f").exists()


def test_a_picture_is_a_file_of_what_it_shows(tmp_path: Path, picture: torch.Tensor) -> None:
    path = picture_file(picture, tmp_path)
    assert np.array_equal(
        np.array(Image.open(path)), np.array(Image.open(demo_picture()).convert("RGB"))
    )
    assert picture_file(torch.cat([picture, 1 - picture]), tmp_path) == path
    assert picture_file(1 - picture, tmp_path) != path
