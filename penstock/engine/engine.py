"""The engine: a model opened under a budget, ready to plan and to run requests."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from penstock.engine.events import Listener
from penstock.engine.job import Job
from penstock.engine.model import ModelFiles
from penstock.engine.pipeline import Run, run
from penstock.engine.report import JobResult
from penstock.engine.request import GenerationRequest, check_task
from penstock.engine.video import check_output
from penstock.errors import UsageError
from penstock.profiles.advice import plan_chosen
from penstock.profiles.hardware import Hardware, probe
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan
from penstock.profiles.profile import AUTO, Chosen, Overrides, choose, load


class Engine:
    """A Wan2.1 model under a byte budget.

    Nothing of the model is loaded before a job needs it, and each part is given back after its
    phase. One job runs at a time; a second waits for the first.

    Example:
        >>> with Engine.open("Wan2.1-I2V-14B-720P-Diffusers", vram="12GiB") as engine:
        ...     job = engine.submit(GenerationRequest(prompt="a cat", image="cat.png"), "cat.mp4")
        ...     report = job.result().report
    """

    def __init__(
        self,
        model: ModelFiles,
        hardware: Hardware,
        *,
        overlapped: bool = True,
        chosen: Chosen | None = None,
    ) -> None:
        self.model = model
        self.chosen = chosen or choose(load(AUTO), Overrides(), hardware)
        self.hardware = self.chosen.hardware
        self._overlapped = overlapped
        self._turn = threading.Lock()
        self._jobs: list[Job] = []

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str = "auto",
        profile: str = AUTO,
        overrides: Overrides | None = None,
        overlapped: bool = True,
    ) -> Engine:
        """Open a model folder; reads headers only.

        Args:
            model: a folder in diffusers' layout (with model_index.json).
            vram, ram: ceilings, such as "12GiB" or bytes; None takes the profile's.
            device: "cuda", "cpu" or "auto" (CUDA where there is one).
            profile: a profile's name or the path of its file.
            overrides: what else wins over the profile.
            overlapped: stream ahead of the computation; False is the sequential reference.

        Raises:
            CheckpointError: the folder is not a model that penstock runs.
            UsageError: an illegal size, device or profile.
        """
        flags = replace(overrides or Overrides(), vram=vram, ram=ram)
        hardware = probe(_device(device))
        chosen = choose(load(profile), flags, hardware)
        model_files = ModelFiles.open(Path(model))
        return cls(model_files, hardware, overlapped=overlapped, chosen=chosen)

    def plan(self, request: GenerationRequest) -> Plan:
        """What the request will take. Pure arithmetic over headers: nothing is loaded.

        Raises:
            OverBudget: no plan fits the budgets.
            RequestError: the request does not suit the model.
        """
        check_task(request, image_to_video=self.model.image_to_video)
        return self.plan_workload(
            Workload(request.video_shape, steps=request.steps, guided=request.uses_guidance)
        )

    def plan_workload(self, workload: Workload) -> Plan:
        """What a video of that shape will take, whatever it shows.

        Raises:
            OverBudget: no plan fits the budgets; names a profile or a request that does.
        """
        return plan_chosen(lambda _: self.model.manifest, workload, self.chosen)

    def submit(
        self,
        request: GenerationRequest,
        output: str | Path | None = None,
        *,
        force: bool = False,
        metadata: bool = True,
    ) -> Job:
        """Start a job.

        Args:
            request: what to make. An open seed is drawn now.
            output: path of the mp4; None keeps the frames in the report's job only.
            force: replace an existing file.
            metadata: put prompt, seed and settings into the file.

        Raises:
            OverBudget, RequestError, OutputError: before anything is loaded.
        """
        request = request.with_seed()
        path = None if output is None else Path(output)
        if path is not None:
            check_output(path, overwrite=force)
        plan = self.plan(request)

        def work(listener: Listener, cancelled: threading.Event) -> JobResult:
            with self._turn:
                return run(
                    Run(
                        model=self.model,
                        request=request,
                        plan=plan,
                        device=torch.device(self.hardware.device),
                        overlapped=self._overlapped,
                        output=path,
                        overwrite=force,
                        metadata=metadata,
                    ),
                    listener,
                    cancelled,
                )

        job = Job(work)
        self._jobs = [known for known in self._jobs if not known.done] + [job]
        return job

    def close(self) -> None:
        """Cancel what runs, wait for it, and close the model's files."""
        for job in self._jobs:
            job.cancel()
            job.wait()
        self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UsageError("unknown device", expected="auto, cuda or cpu", found=repr(name))
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device",
            expected="a CUDA build of torch and a working driver",
            found=f"torch {torch.__version__}",
            remedy="Install a CUDA build of torch, or pass --device cpu.",
        )
    return name
