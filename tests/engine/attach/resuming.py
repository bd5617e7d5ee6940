"""Jobs of tiny pipelines that penstock has no code for: begun, killed at a call, gone on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny_pipelines import build
from penstock.engine.attach import foreign_job
from penstock.engine.attach.foreign_job import CallJob, CallReport
from penstock.engine.attach.recorded import CallKeeper
from penstock.engine.attach.stream import budgets
from penstock.engine.store.journal import Journal
from penstock.formats.formats import get_format
from tests.engine.attach.tiny_ltx2 import REQUEST, ltx2

ROOM = "64MiB"
SMALL = ["prompt=fox", "height=32", "width=32"]
WORDS = {
    "LTX-2": [f"{name}={value}" for name, value in REQUEST.items()],
    "Flux": [*SMALL, "max_sequence_length=16", "num_inference_steps=3"],
    "SDXL": [*SMALL, "num_inference_steps=3"],
    "Wan2.2 A14B": [*SMALL, "num_frames=5", "max_sequence_length=16", "num_inference_steps=4"],
}


def saved(name: str, folder: Path, scheduler: str | None = None) -> Path:
    """A folder with a pipeline; its weights are a function of the name.

    Args:
        scheduler: class of diffusers, in the place of the recipe's.
    """
    pipe = ltx2() if name == "LTX-2" else build(name).pipe
    if scheduler is not None:
        import diffusers

        pipe.scheduler = getattr(diffusers, scheduler).from_config(
            pipe.scheduler.config, **{"skip_prk_steps": True} if "PNDM" in scheduler else {}
        )
    pipe.save_pretrained(str(folder))
    return folder


@dataclass
class Task:
    """A call of a pipeline in a folder, planned.

    Attributes:
        reads: bytes of each network that the last run in this process read.
        held: bytes of RAM by what they were for, after each of its steps.
    """

    model: Path
    words: list[str]
    format: str | None = None
    reads: dict[str, int] = field(default_factory=dict)
    held: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        fmt = None if self.format is None else get_format(self.format)
        self.job = CallJob(self.model, self.words, budgets("cpu", ROOM, ROOM), fmt)

    def made(
        self, keeper: CallKeeper | None = None, *, trusts: bool = False
    ) -> tuple[list[Tensor], CallReport]:
        """What the pipeline gives, all of it, and the report."""
        tensors: list[Tensor] = []
        attach, write = foreign_job.attach_opened, foreign_job._write

        def noted(*args: Any) -> Any:
            attached = attach(*args)
            tenants.extend(attached._desk.tenants)
            ledgers.append(attached.host_ledger)
            return attached

        def told(step: int, steps: int) -> None:
            self.held.append(ledgers[0].by_label())

        def kept(made: Any, pipe: Any, output: Path, *_: Any) -> tuple[list[Path], int]:
            tensors.extend(
                torch.as_tensor(each) for each in vars(made).values() if each is not None
            )
            return [output], 1

        tenants: list[Any] = []
        ledgers: list[Any] = []
        self.held = []
        foreign_job.attach_opened, foreign_job._write = noted, kept
        try:
            report = self.job.run(
                Path("out.mp4"), 3, told=told, keeper=keeper, overwrite=True, trusts=trusts
            )
        finally:
            foreign_job.attach_opened, foreign_job._write = attach, write
            self.reads = {each.name: each.read_bytes for each in tenants}
        return tensors, report

    def begun(self, folder: Path) -> CallKeeper:
        """A job in ``folder``."""
        return self.job.begin(folder, Path("out.mp4"), 3, None, overwrite=True)

    def resumed(
        self, folder: Path, *, allow_nonidentical: bool = False, trusts: bool | None = None
    ) -> tuple[list[Tensor], CallReport]:
        """Go on with the job in ``folder``."""
        journal = Journal.open(folder)
        try:
            keeper, _, _ = self.job.resume(
                journal, None, force=True, allow_nonidentical=allow_nonidentical
            )
        except BaseException:
            journal.close()
            raise
        return self.made(keeper, trusts=allow_nonidentical if trusts is None else trusts)

    def killed(self, folder: Path, at: int, *, settled: bool = True) -> None:
        """Begin the job in a child that is killed (SIGKILL) when call ``at`` has been made.

        Args:
            settled: what it gave is on the disk by then; else it may be.
        """

        def work() -> None:
            keeper = self.begun(folder)
            save = keeper.save_call

            def save_call(number: int, tensors: Any, told: Any) -> None:
                save(number, tensors, told)
                if number == at:
                    if settled:
                        keeper.settle()
                    os.kill(os.getpid(), signal.SIGKILL)

            vars(keeper)["save_call"] = save_call
            self.made(keeper)

        in_child(work)


def in_child(work: Callable[[], None]) -> None:
    """Do ``work`` in a forked process, which must end by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all tensors are equal, to the bit."""
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))
