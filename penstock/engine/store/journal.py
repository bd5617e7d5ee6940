"""A job's directory: what a job needs to continue after its process has ended, however it did.

What its files are called says `penstock.engine.store.names`, and which files there are its own
`penstock.engine.store.owned`: nothing else is ever removed.

Everything is plain JSON or safetensors, sealed with a digest (`penstock.engine.store.sealed`) and
written atomically (`penstock.engine.store.durable`). What can be computed again from an earlier
part is discarded when it is damaged; the job and the sampler's state have two generations.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock.closing import Closing
from penstock.engine.store.durable import (
    FileOps,
    Reserve,
    new_name,
    read_whole,
    storing,
    write_atomically,
    write_new,
)
from penstock.engine.store.generations import Generation, Generations
from penstock.engine.store.lock import JobLock
from penstock.engine.store.names import (
    CONDITIONING_FILE,
    JOB_FILES,
    LAST_PICTURE_FILE,
    LATENTS_FILE,
    LOCK_FILE,
    PICTURE_FILE,
    PICTURES,
    RESERVE_FILE,
    STATE_FILES,
    call_name,
    is_unfinished,
    tag_of,
    tile_name,
    tile_of,
)
from penstock.engine.store.owned import Contents, check_vacant, pictures_in, reserve_mark, sort_out
from penstock.engine.store.sealed import Document, open_json, open_tensors, seal_json, seal_tensors
from penstock.errors import JournalError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the directory; another one is refused."""

HEADER_BYTES = 4096
"""Disk space of a file beside its tensors."""

_UNCOUNTED = (*JOB_FILES, RESERVE_FILE, LOCK_FILE)

_FIELDS: dict[str, tuple[type, ...]] = {
    "job": (str,), "created": (int, float), "state": (str,), "request": (dict,), "plan": (dict,),
    "fingerprint": (dict,), "reserve_bytes": (int,), "facts": (dict,),
}  # fmt: skip

STATES = ("running", "stopped", "failed", "done")
"""What a job may be marked as. "running" while nobody holds the lock means that it was killed."""

Tensors = dict[str, "torch.Tensor"]


class SavedSampler(NamedTuple):
    """The sampler after ``step`` steps: tensors, and plain values that JSON can hold."""

    step: int
    tensors: Tensors
    values: dict[str, Any]


@dataclass(frozen=True)
class JobRecord:
    """What job-N.json holds.

    Attributes:
        job: random id that all files of the job carry.
        created: seconds since 1970.
        state: one of `STATES`.
        request, plan, fingerprint: plain values, as JSON gives them back.
        reserve_bytes: disk space that the job's files take at most.
        facts: plain values that go with the state: the output, an error.
    """

    job: str
    created: float
    state: str
    request: dict[str, Any]
    plan: dict[str, Any]
    fingerprint: dict[str, Any]
    reserve_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def read_record(folder: Path, ops: FileOps | None = None) -> JobRecord:
    """Read the job in ``folder``, without taking its lock.

    Raises:
        JournalError: the folder holds no job, or one whose both records are damaged.
    """
    return _load_record(folder, _record_files(ops or FileOps(), folder))


def _record_files(ops: FileOps, folder: Path, tag: str = "") -> Generations[JobRecord]:
    return Generations(ops, (folder / JOB_FILES[0], folder / JOB_FILES[1]), _parse_record, tag)


def _load_record(folder: Path, files: Generations[JobRecord]) -> JobRecord:
    record = files.load()
    if record is None:
        raise JournalError(
            f"{folder} holds no job",
            expected=" or ".join(JOB_FILES),
            found="neither",
            remedy="`penstock jobs` lists the jobs there are.",
        )
    return record


class Journal(Closing):
    """A job's directory while a process works on it. Made by :meth:`create` and :meth:`open`.

    Attributes:
        folder: the directory.
        record: the job as it was last marked.
    """

    def __init__(self, folder: Path, ops: FileOps, lock: JobLock, job: str) -> None:
        self.folder = folder
        self.record: JobRecord
        self._ops, self._lock, self._tag = ops, lock, tag_of(job)
        self._records = _record_files(ops, folder, self._tag)
        self._states = Generations(
            ops, (folder / STATE_FILES[0], folder / STATE_FILES[1]), self._parse_state, self._tag
        )
        self._reserve = Reserve(ops, folder / RESERVE_FILE, reserve_mark(job), self._tag)
        self._problems: list[str] = []

    @classmethod
    def create(
        cls,
        folder: Path,
        request: Mapping[str, Any],
        plan: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
        picture: bytes | None = None,
        last_picture: bytes | None = None,
        reserve_bytes: int = 0,
        ops: FileOps | None = None,
    ) -> Journal:
        """Begin a job. Its record comes first: no space is taken before it says so. Only the
        picture is on the disk by then, under a name that it leaves when the job is next opened.

        Args:
            folder: made if absent; must be empty.
            request, plan, fingerprint: plain values that JSON can hold.
            facts: plain values that go with the state.
            picture, last_picture: the request's pictures, to keep copies of.
            reserve_bytes: disk space that the job's files will take at most, claimed now.
            ops: the file operations.

        Raises:
            StorageError: no space, or the folder cannot be written.
            JobLocked: another process is at work there.
            JournalError: the folder holds a job already, or files that are no job's.
        """
        ops = ops or FileOps()
        _make_folder(ops, folder)
        check_vacant(ops, folder)  # before the lock: no file of that name is touched
        record = JobRecord(
            job=secrets.token_hex(16),
            created=time.time(),
            state="running",
            request=dict(request),
            plan=dict(plan),
            fingerprint=dict(fingerprint),
            reserve_bytes=reserve_bytes,
            facts=dict(facts or {}),
        )
        journal = cls(folder, ops, JobLock(folder / LOCK_FILE), record.job)
        try:
            copies = {PICTURE_FILE: picture, LAST_PICTURE_FILE: last_picture}
            journal._begin(record, {n: data for n, data in copies.items() if data is not None})
        except BaseException:
            journal.close()
            raise
        return journal

    def _begin(self, record: JobRecord, pictures: Mapping[str, bytes]) -> None:
        self._remove(check_vacant(self._ops, self.folder))
        try:
            # Under a name of their own until the record is there: a crash in between leaves files
            # that are known to be leftovers, and no job that lacks its picture.
            for name, data in pictures.items():
                write_new(self._ops, self.folder / name, [data], self._tag)
            # From here on the job exists. What a crash leaves undone, `open` does: it renames the
            # pictures; the reserve only makes a full disk known now instead of hours later.
            self._save_record(record)
            self._name_pictures()
            if record.reserve_bytes:
                self._reserve.claim(record.reserve_bytes)
        except JournalError:
            self._give_up(record.job)
            raise

    def _name_pictures(self) -> None:
        for name in PICTURES.values():
            path = self.folder / name
            new = new_name(path, self._tag)
            with storing(self._ops, path):
                if new.name in self._ops.names(self.folder):
                    self._ops.rename(new, path)
                    self._ops.fsync_dir(self.folder)

    def _give_up(self, job: str) -> None:
        """Take back a beginning that failed; what cannot be removed is listed, and can be later."""
        try:
            self._remove(sort_out(self._ops, self.folder, job).ours)
            self._lock.remove()
            self._ops.rmdir(self.folder)
        except (JournalError, OSError):
            return  # the first error is the one to report

    @classmethod
    def open(cls, folder: Path, *, ops: FileOps | None = None) -> Journal:
        """Go on with a job.

        Raises:
            JournalError: the folder holds no job, or one whose both records are damaged.
            JobLocked: another process is at work there.
        """
        ops = ops or FileOps()
        # The record before the lock: no lock file is left in a folder without a job.
        job = read_record(folder, ops).job
        journal = cls(folder, ops, JobLock(folder / LOCK_FILE), job)
        try:
            journal.record = _load_record(folder, journal._records)
            journal._name_pictures()
            journal._remove_leftovers()
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Let others work on the job."""
        self._lock.release()

    @property
    def problems(self) -> tuple[str, ...]:
        """Damage that was found so far and worked around, for the report."""
        return (*self._records.problems, *self._states.problems, *self._problems)

    def mark(
        self,
        state: str,
        *,
        plan: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Write down what has become of the job.

        Args:
            state: one of `STATES`.
            plan: replaces the plan.
            fingerprint: replaces the fingerprint.
            facts: plain values, added to those known; None takes one away.

        Raises:
            StorageError: it could not be written; the former record is intact.
        """
        assert state in STATES, state
        merged = {k: v for k, v in (self.record.facts | facts).items() if v is not None}
        record = replace(self.record, state=state, facts=merged)
        if plan is not None:
            record = replace(record, plan=dict(plan))
        if fingerprint is not None:
            record = replace(record, fingerprint=dict(fingerprint))
        self._save_record(record)

    def save_conditioning(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the encoded prompt and picture.

        Raises:
            StorageError: they could not be written.
        """
        self._save_single(CONDITIONING_FILE, tensors)

    def load_conditioning(self) -> Tensors | None:
        """Load the encoded prompt and picture; None where they are missing or damaged."""
        return self._load_single(CONDITIONING_FILE)

    def save_step(
        self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]
    ) -> None:
        """Keep the sampler's state after ``step`` steps (0: the first noise).

        Raises:
            StorageError: it could not be written; the state before it is intact.
        """

        def make(sequence: int) -> Document:
            text = json.dumps(dict(values), allow_nan=False)
            metadata = self._metadata(sequence=str(sequence), step=str(step), values=text)
            return seal_tensors(tensors, metadata)

        self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        self._states.save(make)

    def load_latest(self) -> SavedSampler | None:
        """Load the newest state that is whole; None where the sampling has not begun.

        Raises:
            JournalError: both generations are damaged.
        """
        return self._states.load()

    def save_latents(self, latents: torch.Tensor) -> None:
        """Keep the final latents.

        Raises:
            StorageError: they could not be written.
        """
        self._save_single(LATENTS_FILE, {"latents": latents})

    def load_latents(self) -> torch.Tensor | None:
        """Load the final latents; None where they are missing or damaged."""
        return (self._load_single(LATENTS_FILE) or {}).get("latents")

    def save_tile(self, grid: tuple[int, int], index: int, frames: torch.Tensor) -> None:
        """Keep the decoded pixels of tile ``index`` of a grid of rows and columns.

        Raises:
            StorageError: they could not be written.
        """
        self._save_single(tile_name(grid, index), {"frames": frames})

    def load_tile(self, grid: tuple[int, int], index: int) -> torch.Tensor | None:
        """Load the decoded pixels of a tile; None where they are missing or damaged."""
        return (self._load_single(tile_name(grid, index)) or {}).get("frames")

    def finished_tiles(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the tiles of this grid that have been kept (not yet checked)."""
        found = filter(None, map(tile_of, self._names()))
        return tuple(sorted(index for size, index in found if size == grid))

    def save_call(
        self, number: int, tensors: Mapping[str, torch.Tensor], told: Mapping[str, str]
    ) -> None:
        """Keep what call ``number`` of a network gave.

        Args:
            told: what it was asked, and how its tensors lie together; text.

        Raises:
            StorageError: it could not be written.
        """
        self._save_single(call_name(number), tensors, told)

    def load_call(self, number: int) -> tuple[Tensors, dict[str, str]] | None:
        """Load what call ``number`` gave, and what was told of it; None where that is missing or
        damaged."""
        return self._load_file(call_name(number))

    def discard_work(self) -> None:
        """Remove what a finished job no longer needs: all but the record and the final latents.

        Raises:
            StorageError: a file cannot be removed.
        """
        keep = (*JOB_FILES, LATENTS_FILE, LOCK_FILE)
        self._remove(name for name in self._contents().ours if name not in keep)

    def _contents(self) -> Contents:
        record = self.record
        return sort_out(self._ops, self.folder, record.job, pictures_in(record.request))

    def _save_record(self, record: JobRecord) -> None:
        def make(sequence: int) -> Document:
            return [seal_json({"format": FORMAT, "sequence": sequence} | asdict(record))]

        self._records.save(make)
        self.record = record

    def _save_single(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        told: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._make_room(sum(tensor.nbytes for tensor in tensors.values()))
        document = seal_tensors(tensors, {**told, **self._metadata(file=name)})
        write_atomically(self._ops, self.folder / name, document, self._tag)

    def _load_single(self, name: str) -> Tensors | None:
        found = self._load_file(name)
        return None if found is None else found[0]

    def _load_file(self, name: str) -> tuple[Tensors, dict[str, str]] | None:
        try:
            blob = read_whole(self._ops, self.folder / name)
            if blob is None:
                return None
            tensors, metadata = open_tensors(blob)
            self._check_owner(metadata, file=name)
        except JournalError as error:
            log.info("%s is computed again: %s", name, error)
            self._problems.append(f"{name} is computed again: {error}")
            return None
        return tensors, metadata

    def _parse_state(self, blob: bytes) -> Generation[SavedSampler]:
        tensors, metadata = open_tensors(blob)
        self._check_owner(metadata)
        try:
            sequence, step = int(metadata["sequence"]), int(metadata["step"])
            values = json.loads(metadata["values"])
        except (KeyError, ValueError, RecursionError) as error:
            raise JournalError("not a sampler's state", found=str(error)) from error
        if step < 0 or sequence < 0 or not isinstance(values, dict):
            raise JournalError("not a sampler's state", found=f"step {step}, values {values!r:.80}")
        return Generation(sequence, SavedSampler(step, tensors, values))

    def _metadata(self, **items: str) -> dict[str, str]:
        return {"penstock": str(FORMAT), "job": self.record.job, **items}

    def _check_owner(self, metadata: Mapping[str, str], **items: str) -> None:
        for key, value in self._metadata(**items).items():
            if metadata.get(key) != value:
                raise JournalError(
                    "the file belongs to another job",
                    expected=f"{key} {value}",
                    found=str(metadata.get(key)),
                )

    def _make_room(self, nbytes: int) -> None:
        """Give back so much of the reserve that ``nbytes`` more fit beside the files there are."""
        used = sum(self._size(name) for name in self._names() if name not in _UNCOUNTED)
        room = used + nbytes + HEADER_BYTES
        self._reserve.shrink(max(0, self.record.reserve_bytes - room))

    def _size(self, name: str) -> int:
        path = self.folder / name
        with storing(self._ops, path):
            return self._ops.size(path)

    def _remove_leftovers(self) -> None:
        self._remove(name for name in self._names() if is_unfinished(name, self.record.job))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with storing(self._ops, self.folder / name):
                self._ops.unlink(self.folder / name)

    def _names(self) -> list[str]:
        with storing(self._ops, self.folder):
            return self._ops.names(self.folder)


def _parse_record(blob: bytes) -> Generation[JobRecord]:
    value = open_json(blob)
    version, sequence = value.pop("format", None), value.pop("sequence", None)
    if type(version) is not int or version != FORMAT:
        raise JournalError(
            "the job was written by another version of penstock",
            expected=f"format {FORMAT}",
            found=str(version),
        )
    wrong = [name for name, kinds in _FIELDS.items() if type(value.get(name)) not in kinds]
    wrong += sorted(value.keys() - _FIELDS.keys())
    if type(sequence) is not int or sequence < 0:
        wrong.append("sequence")
    if wrong or value["state"] not in STATES or value["reserve_bytes"] < 0:
        raise JournalError("not a job's record", found=f"illegal {', '.join(wrong) or 'values'}")
    return Generation(sequence, JobRecord(**value))


def _make_folder(ops: FileOps, folder: Path) -> None:
    """Make the folder so that a power loss cannot take it away again."""
    with storing(ops, folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        ops.mkdir(folder)
        for path in reversed(missing):
            ops.fsync_dir(path.parent)
