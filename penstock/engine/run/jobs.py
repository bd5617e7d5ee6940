"""The jobs on this machine: where they are kept, which there are, and removing one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.lora.file import Lora, as_loras
from penstock.engine.model.opening import Opening
from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import (
    JOB_FILES,
    LATENTS_FILE,
    LOCK_FILE,
    STATE_FILES,
    JobRecord,
    is_job_file,
    read_record,
)
from penstock.engine.store.lock import JobLock
from penstock.engine.store.sealed import read_metadata
from penstock.errors import JobLocked, JournalError, StorageError, UsageError
from penstock.folders import data_folder
from penstock.profiles.options import Options
from penstock.profiles.plan import NUMERICS

_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class JobInfo:
    """A job as it is listed.

    Attributes:
        name: of its folder.
        state: "running", "stopped", "failed" or "done" as it was marked; "killed" where it was
            running and nobody works on it any more; "damaged" where no record can be read.
        step: sampler steps that are saved (read from a header, not verified).
        steps: of the request, 0 where unknown.
        created: seconds since 1970, 0 where unknown.
        size_bytes: of all its files.
        record: what the job is, None where it is damaged.
        problem: what is damaged.
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
        """Plain values, ready for json.dumps."""
        return {
            "name": self.name, "folder": str(self.folder), "state": self.state,
            "step": self.step, "steps": self.steps, "created": self.created,
            "size_bytes": self.size_bytes, "problem": self.problem,
        }  # fmt: skip

    @property
    def unfinished(self) -> bool:
        """Whether `penstock resume` has something to do here."""
        return self.state in ("stopped", "failed", "killed")


def jobs_directory() -> Path:
    """Where jobs are kept that were given no folder of their own."""
    return data_folder() / "jobs"


def new_job_folder(root: Path | None = None) -> Path:
    """A folder for a new job: named by the time, not made yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return (root or jobs_directory()) / f"{stamp}-{secrets.token_hex(3)}"


def list_jobs(root: Path | None = None) -> list[JobInfo]:
    """The jobs in ``root`` (default: the data directory), newest first, damaged ones included."""
    root = root or jobs_directory()
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and _holds_job(path)]
    return sorted(map(describe, folders), key=lambda info: (-info.created, info.name))


def describe(folder: Path) -> JobInfo:
    """One job as it is listed."""
    size_bytes = sum(p.stat().st_size for p in folder.iterdir() if is_job_file(p.name))
    try:
        record = read_record(folder)
    except JournalError as error:
        return JobInfo(folder.name, folder, "damaged", 0, 0, 0.0, size_bytes, problem=str(error))
    steps = record.request.get("steps", 0)
    done = (folder / LATENTS_FILE).exists()
    return JobInfo(
        name=folder.name,
        folder=folder,
        state=_state(record, folder),
        step=steps if done else max(_saved_step(folder / name) for name in STATE_FILES),
        steps=steps,
        created=record.created,
        size_bytes=size_bytes,
        record=record,
    )


def find_job(name: str | None, root: Path | None = None) -> Path:
    """The folder of a job.

    Args:
        name: a folder, or the name (or the start of it) of a job in ``root``; None takes the
            unfinished job if there is exactly one.
        root: default: the data directory.

    Raises:
        JournalError: there is none, or more than one.
    """
    if name is not None and _holds_job(Path(name)):
        return Path(name)
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
    """The newest unfinished job that was asked for the same.

    Args:
        request: plain values as the job's record holds them. A seed of None matches any.
        folder: look at the job in this folder only.
        root: look at all jobs in here; default: the data directory.
    """
    if folder is None:
        jobs = list_jobs(root)
    else:
        jobs = [describe(folder)] if _holds_job(folder) else []
    same = (info for info in jobs if info.unfinished and _is_asked_by(info.record, request))
    return next(same, None)


def _is_asked_by(record: JobRecord | None, request: Mapping[str, Any]) -> bool:
    if record is None:
        return False
    before = {name: word for name, word in NUMERICS.items() if word is not None}
    theirs = before | dict(record.request)
    if request.get("seed") is None and "seed" in theirs:
        theirs["seed"] = None
    return theirs == before | dict(request)


def opening_of(
    folder: Path, options: Options | None = None, loras: Sequence[Lora | str] = ()
) -> Opening:
    """The model of a job and its options: device, budgets, format and numerics as they were
    decided, the rest as it was asked for.

    Args:
        folder: of the job.
        options: those that are given replace the job's own; a profile brings its budgets with it.
        loras: likewise.

    Raises:
        JournalError: the folder holds no job, or one that names no model or no options.
    """
    record = read_record(folder)
    opening, own = Opening.from_values(record.request), _options_of(record)
    given = options or Options()
    if given.profile is not None:
        own = replace(own, vram=None, ram=None)
    return replace(opening, loras=as_loras(loras) or opening.loras, options=given.over(own))


def _options_of(record: JobRecord) -> Options:
    """Of a job; those before `Options` tell their budgets, device and numerics only."""
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
        JournalError: the folder holds no job, or files that are not a job's (which stay).
        JobLocked: a process is working on it.
        StorageError: a file cannot be removed.
    """
    if not _holds_job(folder):
        raise JournalError(f"{folder} holds no job", expected=" or ".join(JOB_FILES))
    lock = JobLock(folder / LOCK_FILE)
    try:
        ops = FileOps()
        # The records go last: a removal that is cut short leaves a job that can be removed again.
        names = sorted(ops.names(folder), key=lambda name: name in JOB_FILES)
        for name in filter(is_job_file, names):
            if name != LOCK_FILE:
                ops.unlink(folder / name)
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed", found=error.strerror) from error
    finally:
        lock.release()
    _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    foreign = [name for name in FileOps().names(folder) if not is_job_file(name)]
    (folder / LOCK_FILE).unlink(missing_ok=True)
    if foreign:
        raise JournalError(
            f"{folder} stays: it holds files that are no job's",
            found=", ".join(sorted(foreign)[:5]),
            remedy="The job itself has been removed.",
        )
    folder.rmdir()


def _holds_job(folder: Path) -> bool:
    return any((folder / name).exists() for name in JOB_FILES)


def _state(record: JobRecord, folder: Path) -> str:
    if record.state != "running":
        return record.state
    try:
        JobLock(folder / LOCK_FILE).release()
    except JobLocked:
        return "running"
    return "killed"


def _saved_step(path: Path) -> int:
    try:
        return int(read_metadata(FileOps().read(path, _HEADER_BYTES))["step"])
    except (OSError, JournalError, KeyError, ValueError):
        return 0
