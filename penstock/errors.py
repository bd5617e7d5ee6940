"""Every error penstock raises on purpose. Each says what went wrong, what was expected, what was
found and what to do next, and carries a stable ``code`` for programs.

    PenstockError                     exit 1
    |-- UsageError        usage       exit 2: the call itself is wrong
    |   |-- RequestError      request         a field of a GenerationRequest
    |   |-- ImageError        image           the conditioning picture
    |   |-- OutputError       output          the place the video goes to
    |   `-- ProfileError      profile         a profile or its overrides
    |-- OverBudget        over_budget         no plan fits the budget
    |-- LedgerOverflow    ledger_overflow     a reservation would pass a cap while running
    |-- OutOfMemory       out_of_memory       memory ran out, and no smaller plan is left
    |-- DeviceLost        device_lost         the device failed; this process cannot use it again
    |-- CheckpointError   checkpoint
    |   |-- HeaderError       checkpoint_header    a file's header is damaged, lying or foreign
    |   |-- PickleRefused     checkpoint_pickle    a pickle is never opened
    |   |-- TensorMismatch    checkpoint_tensors   missing, extra or misshaped tensors
    |   `-- CheckpointChanged checkpoint_changed   a file changed after it was opened
    |-- JournalError      job_state           a job's directory is damaged, or holds no job
    |   |-- JobLocked          job_locked           another process is working on the job
    |   |-- StorageError       job_storage          disk full or I/O error; the last state is intact
    |   `-- FingerprintMismatch job_fingerprint     what determines the result has changed
    |-- NonFinite         non_finite          NaN or Inf in the latents
    |-- VideoError        video               the encoder or the container failed
    `-- JobCancelled      cancelled   exit 130
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN_CHARS = 80
_SHOWN_BITS = 256


def brief(value: object) -> str:
    """Return a value of any kind, as it is shown in an error: not more than a line of it.

    A whole number may have more digits than Python is willing to print.
    """
    if type(value) is int and value.bit_length() > _SHOWN_BITS:
        return f"a whole number of {value.bit_length():,} bits"
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."


class PenstockError(Exception):
    """Base of all errors here.

    Args:
        what: what went wrong, in one clause.
        expected: what would have been right.
        found: what was there instead.
        remedy: what the user can do next.
    """

    code = "penstock"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.expected, self.found, self.remedy = what, expected, found, remedy
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let errors be pickled with all that they carry, whatever their constructor asks
        for."""
        return _restored, (type(self), self.args), self.__dict__

    def add_remedy(self, text: str) -> None:
        """Say one thing more that the user can do next.

        Args:
            text: a sentence.

        Raises:
            Nothing.
        """
        self.remedy = text if self.remedy is None else f"{self.remedy.rstrip('.')}. {text}"

    def __str__(self) -> str:
        facts = [
            f"{label} {text}"
            for label, text in (("expected", self.expected), ("found", self.found))
            if text is not None
        ]
        line = self.what + (": " + ", ".join(facts) if facts else "")
        return line if self.remedy is None else f"{line}. {self.remedy}"


def _restored(kind: type[PenstockError], arguments: tuple[Any, ...]) -> PenstockError:
    return kind.__new__(kind, *arguments)


class UsageError(PenstockError):
    """The call itself is wrong: a flag, a field, a path."""

    code = "usage"
    exit_code = 2


class RequestError(UsageError):
    """A field of a GenerationRequest is illegal; names the nearest legal value."""

    code = "request"


class ImageError(UsageError):
    """The conditioning picture is missing, unreadable, too large or no picture."""

    code = "image"


class OutputError(UsageError):
    """The video cannot be written where it was asked for."""

    code = "output"


class ProfileError(UsageError):
    """A profile, or a value that overrides it, is unknown or illegal."""

    code = "profile"


class OverBudget(PenstockError):
    """No plan fits: names the resource, the need, the limit and the largest consumers.

    Args:
        resource: ``"VRAM"`` or ``"RAM"``.
        need_bytes: the smallest peak that any plan reaches.
        limit_bytes: the budget.
        consumers: ``(label, bytes)`` that make up the need, in any order.
        remedy: what would fit.
        nearest: width, height and frames of the largest smaller video that fits, where one does.
    """

    code = "over_budget"

    def __init__(
        self,
        resource: str,
        need_bytes: int,
        limit_bytes: int,
        consumers: Sequence[tuple[str, int]],
        remedy: str,
        nearest: tuple[int, int, int] | None = None,
    ) -> None:
        self.nearest = nearest
        self.resource, self.need_bytes, self.limit_bytes = resource, need_bytes, limit_bytes
        self.consumers = tuple(sorted(consumers, key=lambda item: -item[1]))
        label, largest = self.consumers[0]
        super().__init__(
            f"no plan fits the {resource} budget",
            expected=f"at least {need_bytes:,} bytes{_in_gib(need_bytes)}",
            found=f"a limit of {limit_bytes:,} bytes "
            f"(largest consumer: {label}, {largest:,} bytes)",
            remedy=remedy,
        )


def _in_gib(nbytes: int) -> str:
    return f" ({nbytes / (1 << 30):.2f} GiB)" if nbytes >= 1 << 30 else ""


class LedgerOverflow(PenstockError):
    """A reservation would pass the ledger's cap while a job runs.

    Args:
        what, expected, found, remedy: as for every error.
        memory: name of the ledger, "VRAM" or "RAM".
    """

    code = "ledger_overflow"

    def __init__(self, what: str, *, memory: str = "VRAM", **facts: str) -> None:
        self.memory = memory
        super().__init__(what, **facts)


class OutOfMemory(PenstockError):
    """Memory ran out while a job ran, and every smaller plan has been tried."""

    code = "out_of_memory"


class DeviceLost(PenstockError):
    """The device reported an error that this process cannot recover from (a lost CUDA context)."""

    code = "device_lost"


class CheckpointError(PenstockError):
    """A model's files cannot be used."""

    code = "checkpoint"


class NotRun(CheckpointError):
    """A whole model that penstock knows by name and does not run."""

    code = "checkpoint_not_run"


class HeaderError(CheckpointError):
    """A header is damaged, lies about the file, or belongs to something else."""

    code = "checkpoint_header"


class PickleRefused(CheckpointError):
    """The file is a pickle, which can run code when opened; it is never opened."""

    code = "checkpoint_pickle"


class TensorMismatch(CheckpointError):
    """Tensors are missing, extra or of another shape than the model's config demands."""

    code = "checkpoint_tensors"


class CheckpointChanged(CheckpointError):
    """A file was truncated, replaced or touched after it was opened."""

    code = "checkpoint_changed"


class JournalError(PenstockError):
    """A job's directory cannot be used: it is damaged beyond both generations, or holds no job."""

    code = "job_state"


class JobLocked(JournalError):
    """Another process (or another job of this one) is working in the job's directory."""

    code = "job_locked"


class StorageError(JournalError):
    """A job's state could not be written or read; what was saved before is intact."""

    code = "job_storage"


class FingerprintMismatch(JournalError):
    """A resume would not be identical: names what differs.

    Args:
        differences: ``(field, then, now)`` of everything that differs.
        files: paths of the files among it, for people.
    """

    code = "job_fingerprint"

    def __init__(
        self, differences: Sequence[tuple[str, object, object]], files: Sequence[str] = ()
    ) -> None:
        self.differences = tuple(differences)
        changed = f" (changed: {', '.join(files)})" if files else ""
        super().__init__(
            "the job began under other conditions, so its continuation would not be identical"
            + changed,
            expected="; ".join(f"{field} {then!r}" for field, then, _ in self.differences),
            found="; ".join(f"{field} {now!r}" for field, _, now in self.differences),
            remedy="Restore them, or pass --allow-nonidentical to continue all the same.",
        )


class NonFinite(PenstockError):
    """NaN or Inf appeared in the latents; the job stops at that step."""

    code = "non_finite"


class VideoError(PenstockError):
    """The video encoder or container failed."""

    code = "video"


class JobCancelled(PenstockError):
    """The job was stopped on request."""

    code = "cancelled"
    exit_code = 130
