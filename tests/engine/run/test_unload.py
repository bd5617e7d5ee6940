"""After a job and `unload` the memory is as it was: by live tensors, by RSS, by open files."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import penstock.engine.engine as engine_module
from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.events import Listener
from penstock.engine.run.pipeline import run
from penstock.engine.run.report import JobResult
from penstock.engine.run.stage import Run, Stage
from penstock.errors import UsageError
from penstock.units import MIB
from tests.engine.running import Gate, a_request, an_engine
from tests.meter import StorageMeter

LARGE = {"num_layers": 12, "num_attention_heads": 8, "ffn_dim": 6144}


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some hundred MB, most of which a job holds at once."""
    folder = tmp_path_factory.mktemp("large")
    return write_tiny_model(folder, image_to_video=False, transformer=LARGE, vae={"base_dim": 8})


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[StorageMeter, Stage]]]:
    """Jobs run inside a meter; gives each job's meter and stage."""
    seen: list[tuple[StorageMeter, Stage]] = []
    stages: list[Stage] = []
    initialise = Stage.__init__

    def remember(self: Stage, *arguments: Any) -> None:
        initialise(self, *arguments)
        stages.append(self)

    def metered_run(work: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
        # Not counted: small tables that the networks' classes themselves hold from the opening on.
        modules = (component.module for component in work.model.components())
        tables = [b for module in modules for b in module.buffers() if not b.is_meta]
        with StorageMeter(tables) as meter:  # sees the thread that it is entered on
            result = run(work, listener, cancelled)
        seen.append((meter, stages[-1]))
        return result

    monkeypatch.setattr(Stage, "__init__", remember)
    monkeypatch.setattr(engine_module, "run", metered_run)
    yield seen


def test_no_tensor_outlives_a_job_but_its_result(
    t2v_folder: Path, metered: list[tuple[StorageMeter, Stage]]
) -> None:
    with an_engine(t2v_folder) as engine:
        job = engine.submit(a_request(), on_step=lambda step, latents: latents, preview_every=1)
        result = job.result()
        engine.unload()
        ((meter, stage),) = metered
        assert meter.peak > 10 * result.latents.nbytes
        assert stage.device_ledger.used == stage.host_ledger.used == 0
        kept = result.latents.nbytes + result.video.nbytes
        fitted = 17 * 3 * 4  # the map of the previews
        assert meter.live <= kept + fitted
        del job, result
        gc.collect()
        assert meter.live <= fitted


def test_memory_and_files_are_given_back_and_the_next_job_loads_again(large_folder: Path) -> None:
    process = psutil.Process()
    with an_engine(large_folder, vram="1GiB", ram="1GiB") as engine:
        size = engine.model.manifest.transformer.weights.total_bytes
        assert size > 100 * MIB
        first, _ = _frames_of_a_job(engine)  # what libraries load once is loaded now
        engine.unload()
        before, files, threads = _resident(process), process.num_fds(), threading.active_count()
        left = []
        for _ in range(3):
            frames, held = _frames_of_a_job(engine)
            assert held > before + size // 2
            engine.unload()
            left.append(_resident(process) - before)
            assert torch.equal(frames, first)
        # The median: the interpreter's own pools come and go by a few MB.
        assert sorted(left)[1] <= before // 100
        assert process.num_fds() == files
        assert threading.active_count() == threads


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _frames_of_a_job(engine: Engine) -> tuple[torch.Tensor, int]:
    """Its frames, and the most RSS that was seen between two steps."""
    process, held = psutil.Process(), []
    job = engine.submit(a_request(), on_step=lambda *_: held.append(_resident(process)))
    return job.result().video, max(held)


def test_an_engine_at_work_does_not_unload(t2v_folder: Path) -> None:
    gate = Gate()
    with an_engine(t2v_folder) as engine:
        job = engine.submit(a_request(), on_step=gate)
        assert gate.reached.wait()
        with pytest.raises(UsageError, match="a job is running.*Cancel the job, or wait for it"):
            engine.unload()
        gate.open()
        for _ in job.events():
            pass
        engine.unload()  # the last event is enough to wait for
        job.result()


def test_the_engine_does_not_keep_the_frames_of_a_job(t2v_folder: Path) -> None:
    with an_engine(t2v_folder) as engine:
        job = engine.submit(a_request())
        result = job.result()
        alive = weakref.ref(result)
        assert alive() is result
        del job, result
        gc.collect()
        assert alive() is None
