"""The jobs on this machine: where they are kept, which there are, and removing one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.request.generation import COHERENT_FRAMES
from penstock.engine.store.durable import FileOps, new_name, remove_if_empty
from penstock.engine.store.journal import JobRecord, read_record
from penstock.engine.store.lock import JobLock, is_locked
from penstock.engine.store.names import (
    JOB_FILES,
    LATENTS_FILE,
    LOCK_FILE,
    STATE_FILES,
    is_call,
    is_job_file,
    is_unfinished,
    tag_of,
)
from penstock.engine.store.owned import Contents, check_vacant, pictures_in, sort_out
from penstock.engine.store.sealed import read_metadata
from penstock.errors import JournalError, StorageError, UsageError
from penstock.folders import data_folder
from penstock.profiles.options import Options
from penstock.profiles.plan import NUMERICS

if TYPE_CHECKING:
    from penstock.engine.lora.file import Lora
    from penstock.engine.model.opening import Opening

_HEADER_BYTES = 1 << 20

PIPELINE_FOLDER = "pipeline_folder"
"""In the request of a job whose steps diffusers runs: where the pipeline lies."""


@dataclass(frozen=True)
class JobInfo:
    """A job as it is listed.

    Attributes:
        name: of its folder.
        state: "running", "stopped", "failed" or "done" as it was marked; "killed" where it was
            running and nobody works on it any more; "damaged" where no record can be read;
            "unreadable" where the system does not let us look.
        step: sampler steps that are saved (read from a header, not verified).
        steps: of the request, 0 where unknown.
        created: seconds since 1970, 0 where unknown.
        size_bytes: of all its files.
        record: what the job is, None where it is damaged.
        problem: what is damaged, or missing to go on.
    """

    name: str
    folder: Path
    state: str
    step: int
    steps: int
    created: float
    size_bytes: int
    record: JobRecord | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return {
            "name": self.name, "folder": str(self.folder), "state": self.state,
            "step": self.step, "steps": self.steps, "created": self.created,
            "size_bytes": self.size_bytes, "problem": self.problem,
        }  # fmt: skip

    @property
    def unfinished(self) -> bool:
        """Whether `penstock resume` has something to do here."""
        return self.state in ("stopped", "failed", "killed") and self.problem is None


def jobs_directory() -> Path:
    """Return where jobs are kept that were given no folder of their own."""
    return data_folder() / "jobs"


def new_job_folder(root: Path | None = None) -> Path:
    """Return a folder for a new job: named by the time, not made yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (root or jobs_directory()) / f"{stamp}-{secrets.token_hex(3)}"


def list_jobs(root: Path | None = None) -> list[JobInfo]:
    """Return the jobs in ``root`` (default: the data directory), newest first, damaged ones
    included.

    Nothing that happens to them meanwhile disturbs it, nor does it disturb them: a folder that goes
    away is left out, one that cannot be read is told so.

    Raises:
        StorageError: ``root`` cannot be read.
    """
    root = root or jobs_directory()
    try:
        folders = sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{root} cannot be read", found=error.strerror) from error
    found = [info for info in map(_glimpse, folders) if info is not None]
    return sorted(found, key=lambda info: (-info.created, info.name))


def _glimpse(folder: Path) -> JobInfo | None:
    """As `describe`; None where the folder holds no job, or is gone by now."""
    try:
        return describe(folder) if folder.is_dir() and _holds_job(folder) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        return _unknown(folder, "unreadable", 0, error.strerror or str(error))


def _unknown(folder: Path, state: str, size_bytes: int, problem: str) -> JobInfo:
    return JobInfo(folder.name, folder, state, 0, 0, 0.0, size_bytes, problem=problem)


def describe(folder: Path) -> JobInfo:
    """Return one job as it is listed.

    Raises:
        OSError: the folder cannot be read.
    """
    size_bytes = sum(_size(path) for path in folder.iterdir() if is_job_file(path.name))
    try:
        record = read_record(folder)
    except JournalError as error:
        return _unknown(folder, "damaged", size_bytes, str(error))
    steps = record.request.get("steps", 0)
    steps = steps if type(steps) is int else 0
    done = (folder / LATENTS_FILE).exists()
    return JobInfo(
        name=folder.name,
        folder=folder,
        state=_state(record, folder),
        step=steps if done else _step(record, folder, steps),
        steps=steps,
        created=record.created,
        size_bytes=size_bytes,
        record=record,
        problem=_lacks(record, folder),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # a job that runs renames and removes files


def _lacks(record: JobRecord, folder: Path) -> str | None:
    """Return what a job needs to go on and has not."""
    wanted = () if record.state == "done" else pictures_in(record.request)
    paths = [folder / name for name in wanted]
    there = [p.exists() or new_name(p, tag_of(record.job)).exists() for p in paths]
    return None if all(there) else "its picture is missing"


def find_job(name: str | None, root: Path | None = None) -> Path:
    """Find the folder of a job.

    Args:
        name: a folder, or the name (or the start of it) of a job in ``root``; None takes the
            unfinished job if there is exactly one.
        root: default: the data directory.

    Raises:
        JournalError: there is none, or more than one.
    """
    try:
        if name is not None and _holds_job(Path(name).expanduser()):
            return Path(name).expanduser()
    except OSError as error:
        raise StorageError(f"{name} cannot be read", found=error.strerror) from error
    known = list_jobs(root)
    if name is None:
        matches = [info for info in known if info.unfinished]
    else:
        matches = [info for info in known if info.name == name] or [
            info for info in known if info.name.startswith(name)
        ]
    if len(matches) == 1:
        return matches[0].folder
    raise JournalError(
        "no unfinished job" if name is None else f"no job {name}",
        expected="exactly one",
        found=", ".join(info.name for info in matches) or "none",
        remedy="`penstock jobs` lists them; name one of them, or give its folder.",
    )


def find_unfinished(
    request: Mapping[str, Any], folder: Path | None = None, root: Path | None = None
) -> JobInfo | None:
    """Find the newest unfinished job that was asked for the same.

    Args:
        request: plain values as the job's record holds them. A seed of None matches any.
        folder: look at the job in this folder only.
        root: look at all jobs in here; default: the data directory.
    """
    if folder is None:
        jobs = list_jobs(root)
    else:
        known = _glimpse(folder)
        jobs = [] if known is None else [known]
    same = (info for info in jobs if info.unfinished and _is_asked_by(info.record, request))
    return next(same, None)


def _is_asked_by(record: JobRecord | None, request: Mapping[str, Any]) -> bool:
    if record is None:
        return False
    before = {name: word for name, word in NUMERICS.items() if word is not None}
    theirs = before | dict(record.request)
    if "fit" in request.keys() - theirs.keys() and request.get("image") is None:
        theirs["fit"] = request["fit"]  # from before there was one, and there is no picture
    if request.get("frames", 0) > COHERENT_FRAMES:
        theirs.setdefault("window", 0)  # from before windows
    # What could not be chosen yet, and is not
    theirs |= {name: None for name in request.keys() - theirs.keys() if request[name] is None}
    if request.get("seed") is None and "seed" in theirs:
        theirs["seed"] = None
    return theirs == before | dict(request)


def is_of_pipeline(record: JobRecord) -> bool:
    """Return whether a job is one of a pipeline whose steps diffusers runs."""
    return PIPELINE_FOLDER in record.request


def opening_of(
    folder: Path, options: Options | None = None, loras: Sequence[Lora | str] = ()
) -> Opening:
    """Return the model of a job and its options: device, budgets, format and numerics as they were
    decided, the rest as it was asked for.

    Args:
        folder: of the job.
        options: those that are given replace the job's own; a profile brings its budgets with it.
        loras: likewise.

    Raises:
        JournalError: the folder holds no job, or one that names no model or no options.
    """
    # Here, for torch comes with them, and a list of jobs needs none
    from penstock.engine.lora.file import as_loras
    from penstock.engine.model.opening import Opening

    record = read_record(folder)
    if is_of_pipeline(record):
        raise JournalError(
            f"the job in {folder} is of a pipeline that diffusers runs",
            expected="a job of a model that penstock runs itself",
            found=str(record.request[PIPELINE_FOLDER]),
            remedy="Continue it with `penstock resume`.",
        )
    opening, own = Opening.from_values(record.request), _options_of(record)
    given = options or Options()
    if given.profile is not None:
        own = replace(own, vram=None, ram=None)
    return replace(opening, loras=as_loras(loras) or opening.loras, options=given.over(own))


def _options_of(record: JobRecord) -> Options:
    """Return the options of a job; those before `Options` tell their budgets, device and numerics
    only."""
    plan = record.plan
    decided = {
        "vram": plan.get("vram_limit_bytes"),
        "ram": plan.get("ram_limit_bytes"),
        "format": plan.get("weight_format"),
    } | {name: plan.get(name) for name in NUMERICS if name != "weight_format"}
    try:
        asked = {"device": record.facts.get("device")} | plan.get("options", {})
        return Options(**decided).over(Options.from_json(asked))
    except (TypeError, UsageError) as error:
        raise JournalError("the job's record holds no options", found=str(error)) from error


def remove_job(folder: Path) -> None:
    """Remove a job's files, and its folder if nothing else is in it.

    Raises:
        JournalError: the folder holds no job, or files that penstock did not make (which stay).
        JobLocked: a process is working on it.
        StorageError: a file cannot be removed.
    """
    ops = FileOps()
    if not _holds_job(folder) or not _own(ops, folder).ours:
        raise JournalError(
            f"{folder} holds no job",
            expected=f"{' or '.join(JOB_FILES)}, made by penstock",
            remedy="Nothing was removed.",
        )
    lock = JobLock(folder / LOCK_FILE)
    try:
        contents = _own(ops, folder)
        # The records go last: a removal that is cut short leaves a job that can be removed again.
        for name in contents.ours:
            if name != LOCK_FILE:
                ops.unlink(folder / name)
        lock.remove()
        if not contents.foreign:
            remove_if_empty(ops, folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed", found=error.strerror) from error
    finally:
        lock.release()
    if contents.foreign:
        raise JournalError(
            f"{folder} was kept: it holds files that penstock did not make, or that are damaged",
            found=contents.shown,
            remedy="The rest of the job has been removed.",
        )


def _own(ops: FileOps, folder: Path) -> Contents:
    """Return what of the folder is the job's; of a beginning that was cut short, all of it may
    be."""
    try:
        record = read_record(folder, ops)
    except JournalError:
        found = sort_out(ops, folder)
        return found if found.ours else _beginning(ops, folder)
    return sort_out(ops, folder, record.job, pictures_in(record.request))


def _beginning(ops: FileOps, folder: Path) -> Contents:
    try:
        return Contents((*check_vacant(ops, folder), LOCK_FILE), ())
    except JournalError:
        return Contents((), tuple(ops.names(folder)))


def _holds_job(folder: Path) -> bool:
    """Return whether there are a job's records, or was begun to write them.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(name in JOB_FILES or is_unfinished(name) for name in names)


def _state(record: JobRecord, folder: Path) -> str:
    if record.state != "running":
        return record.state
    return "running" if is_locked(folder / LOCK_FILE) else "killed"


def _step(record: JobRecord, folder: Path, steps: int) -> int:
    """Return the steps that are saved. Where calls of networks are kept instead of the sampler's
    state, those whose calls are all there."""
    kept = record.plan.get("kept")
    calls = kept.get("calls") if isinstance(kept, dict) else None
    if type(calls) is int and calls > 0:
        if record.state == "done":
            return steps
        return min(steps, sum(is_call(path.name) for path in folder.iterdir()) * steps // calls)
    return max(_saved_step(folder / name) for name in STATE_FILES)


def _saved_step(path: Path) -> int:
    try:
        return int(read_metadata(FileOps().read(path, _HEADER_BYTES))["step"])
    except (OSError, JournalError, KeyError, ValueError):
        return 0
