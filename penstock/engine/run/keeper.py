"""What a running job keeps, and what it finds kept: the pipeline's view of a job's directory.

`Keeper` keeps nothing; `JournalKeeper` writes a journal, on a thread of its own, so that the disk
works while the next step computes. A save is complete before the one after it begins, and before
the next step is counted as done: at most one finished step is ever lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from penstock.engine.media.claim import OutputClaim
from penstock.engine.run.fingerprint import SUM
from penstock.engine.run.sampler import SamplerState
from penstock.engine.store.digest import stamp
from penstock.engine.store.journal import Journal
from penstock.errors import JobCancelled, JournalError, PenstockError
from penstock.profiles.plan import Plan


class Told(Protocol):
    """What a finished job tells: a `RunReport`, or one like it.

    Attributes:
        output: the file that was written, if one was.
    """

    @property
    def output(self) -> str | None: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""


@dataclass(frozen=True)
class Conditions:
    """What the transformer is told, on the CPU.

    Attributes:
        texts: states (1, tokens, d) of the prompt and, with guidance, of the negative prompt.
        image: image states (1, tokens, image_dim), or None.
        condition: mask and latents of the picture (1, 20, t, h, w), or None.
    """

    texts: tuple[Tensor, ...]
    image: Tensor | None = None
    condition: Tensor | None = None


@dataclass(frozen=True)
class Point:
    """The sampling after a finished step.

    Attributes:
        latents: (1, z, t, h, w), fp32.
        solver: the solver's history; its ``values["next_step"]`` steps are done.
    """

    latents: Tensor
    solver: SamplerState

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.solver.values["next_step"])


class Keeper:
    """Keeps nothing and finds nothing.

    Args:
        claim: of the output's name, held until :meth:`close`.
    """

    keeps = False
    """Whether anything is kept: the plan then counts what is being saved or read."""

    problems: tuple[str, ...] = ()
    """Damage that was found and worked around."""

    def __init__(self, claim: OutputClaim | None = None) -> None:
        self._steered, self._claim = False, claim

    @property
    def steered(self) -> bool:
        """Whether the latents have been replaced from outside, now or before."""
        return self._steered

    def save_steered(self) -> None:
        """From now on the latents are not what the request alone leads to."""
        self._steered = True

    def conditions(self) -> Conditions | None:
        """Return the encoded prompt and picture."""
        return None

    def save_conditions(self, conditions: Conditions) -> None:
        """Save the encoded prompt and picture."""

    def point(self) -> Point | None:
        """Return where the sampling stood."""
        return None

    def save_point(self, point: Point) -> None:
        """Save where the sampling stands. Returns before it is on the disk."""

    def settle(self) -> None:
        """Return when all that was given is on the disk."""

    def latents(self) -> Tensor | None:
        """Return the final latents."""
        return None

    def save_latents(self, latents: Tensor) -> None:
        """Save the final latents."""

    def tiles(self, grid: tuple[int, int]) -> Iterable[tuple[int, Tensor]]:
        """Return decoded tiles of a grid of rows and columns: index and pixels (frames, h, w,
        3)."""
        return ()

    def save_tile(self, grid: tuple[int, int], index: int, frames: Tensor) -> None:
        """Save a decoded tile."""

    def save_plan(self, plan: Plan) -> None:
        """Keep another plan, under which the job goes on."""

    def lacks_sums(self) -> bool:
        """Return whether it is not known yet, to the byte, which files the job reads."""
        return False

    def save_sums(self, sums: Mapping[str, str]) -> None:
        """Save checksums of files that the job reads, by their names in its fingerprint."""

    def writing_output(self, file: Path) -> None:
        """Note that the finished ``file`` is about to get its name."""

    def finished(self, report: Told) -> None:
        """Note that the job is done."""

    def ended(self, error: BaseException) -> str | None:
        """Note that the job ends with ``error``, and return how it is continued."""
        return None

    def close(self) -> None:
        """Nothing more will be kept; the output's name is free for others."""
        if self._claim is not None:
            self._claim.release()


class JournalKeeper(Keeper):
    """Keeps a job in its journal.

    Args:
        journal: open; closed by :meth:`close`.
        claim: of the output's name, likewise.
    """

    keeps = True

    def __init__(self, journal: Journal, claim: OutputClaim | None = None) -> None:
        super().__init__(claim)
        self._journal = journal
        self._writer = ThreadPoolExecutor(1, "penstock-journal")
        self._pending: Future[None] | None = None

    @property
    def problems(self) -> tuple[str, ...]:  # type: ignore[override]
        """Damage that was found and worked around."""
        return self._journal.problems

    @property
    def steered(self) -> bool:
        """Whether the latents have been replaced from outside, now or before."""
        return bool(self._journal.record.facts.get("steered"))

    def save_steered(self) -> None:
        """Note it at once: no state that was steered may be found without the note.

        Raises:
            StorageError: it could not be written.
        """
        self.settle()
        self._journal.mark("running", steered=True)

    def _write(self, save: Callable[[], None]) -> None:
        self.settle()
        self._pending = self._writer.submit(save)

    def _write_copies(
        self, tensors: dict[str, Tensor], save: Callable[[dict[str, Tensor]], None]
    ) -> None:
        """Write tensors that are nobody else's, and let them go then: the writer's thread may hold
        on to the call for a while."""

        def write() -> None:
            try:
                save(tensors)
            finally:
                tensors.clear()

        self._write(write)

    def settle(self) -> None:
        """Return when all that was given is on the disk.

        Raises:
            StorageError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def conditions(self) -> Conditions | None:
        """Return the encoded prompt and picture; None where they are missing or damaged."""
        tensors = self._journal.load_conditioning()
        if tensors is None:
            return None
        texts = [tensors[name] for name in ("text.0", "text.1") if name in tensors]
        return Conditions(tuple(texts), tensors.get("image"), tensors.get("condition"))

    def save_conditions(self, conditions: Conditions) -> None:
        """Save the encoded prompt and picture."""
        tensors = {f"text.{index}": text for index, text in enumerate(conditions.texts)}
        for name in ("image", "condition"):
            if (tensor := getattr(conditions, name)) is not None:
                tensors[name] = tensor
        self._write(lambda: self._journal.save_conditioning(tensors))

    def point(self) -> Point | None:
        """Return where the sampling stood; None where it had not begun.

        Raises:
            JournalError: both generations are damaged.
        """
        kept = self._journal.load_latest()
        if kept is None:
            return None
        tensors = dict(kept.tensors)
        try:
            point = Point(tensors.pop("latents"), SamplerState(kept.values, tensors))
            if point.step != kept.step:
                raise ValueError(f"step {kept.step} holds step {point.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError("the saved state is no sampler's", found=str(error)) from error
        return point

    def save_point(self, point: Point) -> None:
        """Save where the sampling stands. Returns before it is on the disk."""
        self.settle()  # first: only one copy of the state is alive at a time
        # Copies: the solver and the next step may work in place while these are written.
        tensors = {name: _copy(tensor) for name, tensor in point.solver.tensors.items()}
        tensors["latents"] = _copy(point.latents)
        step, values = point.step, dict(point.solver.values)
        self._write_copies(tensors, lambda held: self._journal.save_step(step, held, values))

    def latents(self) -> Tensor | None:
        """Return the final latents; None where they are missing or damaged."""
        return self._journal.load_latents()

    def save_latents(self, latents: Tensor) -> None:
        """Save the final latents."""
        self._write(lambda: self._journal.save_latents(latents))

    def tiles(self, grid: tuple[int, int]) -> Iterable[tuple[int, Tensor]]:
        """Return decoded tiles that are whole: index and pixels (frames, h, w, 3)."""
        for index in self._journal.finished_tiles(grid):
            frames = self._journal.load_tile(grid, index)
            if frames is not None:
                yield index, frames

    def save_tile(self, grid: tuple[int, int], index: int, frames: Tensor) -> None:
        """Save a decoded tile."""
        self._write(lambda: self._journal.save_tile(grid, index, frames))

    def save_plan(self, plan: Plan) -> None:
        """Keep another plan, under which the job goes on."""
        self.settle()
        self._journal.mark("running", plan=plan.to_json())

    def lacks_sums(self) -> bool:
        """Return whether a large file is known by samples only: none of the job is computed yet
        then."""
        files = self._journal.record.fingerprint.get("files", {})
        return any(_is_sampled(entry) and SUM not in entry for entry in files.values())

    def save_sums(self, sums: Mapping[str, str]) -> None:
        """Save checksums of files that the job reads, by their names in its fingerprint."""
        self.settle()
        fingerprint = self._journal.record.fingerprint
        files = {
            name: entry | ({SUM: sums[name]} if _is_sampled(entry) and name in sums else {})
            for name, entry in fingerprint.get("files", {}).items()
        }
        self._journal.mark("running", fingerprint={**fingerprint, "files": files})

    def writing_output(self, file: Path) -> None:
        """From now on a file with these bytes under the output's name is this job's own."""
        self.settle()
        self._journal.mark("running", output_begun=stamp(file))

    def finished(self, report: Told) -> None:
        """Note that the job is done, and remove what it no longer needs."""
        self.settle()
        facts: dict[str, Any] = {"report": report.to_json(), "error": None}
        if report.output is not None:
            facts["output"] = str(Path(report.output).absolute())
        self._journal.mark("done", **facts)
        self._journal.discard_work()

    def ended(self, error: BaseException) -> str | None:
        """Note that the job ends with ``error``, and return how it is continued."""
        state = "stopped" if isinstance(error, JobCancelled) else "failed"
        code = error.code if isinstance(error, PenstockError) else type(error).__name__
        try:
            self.settle()
            self._journal.mark(state, error=f"{code}: {error}")
        except JournalError as second:
            # The first error is the one to report; an unmarked job counts as killed and resumes.
            return f"Its end could not be noted ({second})."
        return (
            f"The job is kept: continue it with `penstock resume {self._journal.folder.absolute()}`"
        )

    def close(self) -> None:
        """Finish writing and let others work on the job."""
        self._writer.shutdown()
        self._journal.close()
        super().close()


def _is_sampled(entry: Mapping[str, Any]) -> bool:
    return "samples_sha256" in entry


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
