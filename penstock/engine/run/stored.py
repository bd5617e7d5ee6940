"""A job as its journal holds it: request, plan and settings as plain values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from penstock.engine.model.files import ModelFiles
from penstock.engine.model.grid import Grid
from penstock.engine.model.opening import Opening
from penstock.engine.packs.firstuse import PACKING
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.levels import RULE
from penstock.engine.run.fingerprint import (
    SUM,
    Fingerprint,
    check_fingerprint,
    fingerprint,
    with_sums,
)
from penstock.engine.store.digest import reading, stamp
from penstock.engine.store.journal import HEADER_BYTES, Journal
from penstock.engine.store.names import PICTURES
from penstock.engine.store.owned import pictures_in
from penstock.engine.store.sums import Sums, how_told
from penstock.errors import JournalError, RequestError, StorageError, UsageError
from penstock.profiles.plan import NUMERICS, Plan, rounding

STATE_TENSORS = 5
"""Latents and the solver's history at most: UniPC keeps three of the latents' size (order 2)."""

_NOT_OF_THE_REQUEST = ("model", "files", "loras", *NUMERICS)

_BEFORE: Mapping[str, Any] = MappingProxyType({"fit": "stretch", "window": 0})
"""Of requests whose records do not name it: what was done before it could be chosen."""

GENERATIONS = 3
"""Of the sampler's state: two are kept while a third is written."""


@dataclass(frozen=True)
class Order:
    """What goes with a request.

    Attributes:
        output: where the mp4 goes; None: nowhere.
        overwrite: replace an existing file.
        metadata: prompt and settings go into the file.
    """

    output: Path | None
    overwrite: bool = False
    metadata: bool = True

    def facts(self) -> dict[str, Any]:
        """Return plain values, for the record."""
        return {
            "output": None if self.output is None else str(self.output.absolute()),
            "overwrite": self.overwrite,
            "metadata": self.metadata,
        }


def request_values(request: GenerationRequest, opening: Opening, plan: Plan) -> dict[str, Any]:
    """Return the request as plain values, with where the model is, and how its transformer is
    stored, computes and attends under ``plan``; the picture is told by its content.

    Raises:
        StorageError: the picture cannot be read.
    """
    paths = {name: getattr(request, name) for name in PICTURES}
    pictures = {name: None if path is None else stamp(path) for name, path in paths.items()}
    after = None if request.after is None else str(request.after.absolute())
    return asdict(request) | pictures | {"after": after} | opening.values() | plan.numerics


def begin(
    folder: Path,
    model: ModelFiles,
    request: GenerationRequest,
    plan: Plan,
    now: Fingerprint,
    order: Order,
) -> tuple[Journal, GenerationRequest]:
    """Make a job's directory; returns the journal, and the request on the copy of its picture.

    Args:
        now: the fingerprint of today, as `conditions_now` gives it.

    Raises:
        StorageError: no space, or the folder cannot be written.
        JournalError, JobLocked: there is a job already.
    """
    copies = {name: _bytes_of(getattr(request, name)) for name in PICTURES}
    journal = Journal.create(
        folder,
        request_values(request, model.opening, plan),
        plan.to_json(),
        now,
        facts=order.facts(),
        picture=copies["image"],
        last_picture=copies["last_image"],
        reserve_bytes=reserve_bytes(model, request),
    )
    kept: dict[str, Any] = {
        name: folder / PICTURES[name] for name, data in copies.items() if data is not None
    }
    return journal, replace(request, **kept)


def _bytes_of(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with reading(path):
        return path.read_bytes()


def conditions_now(model: ModelFiles, device: torch.device, how: Mapping[str, str]) -> Fingerprint:
    """Return the fingerprint of a job of this model on this device; chunks and tiles are compared
    apart.

    Args:
        model: as its files hold it: a pack of them is a function of its format.
        how: its transformer's matrices are stored and multiply, and its tokens attend
            (`penstock.engine.variants.Variants.numerics`).
    """
    dtypes = {component.name: str(component.dtype) for component in model.components()}
    numerics: dict[str, Any] = {"dtypes": dtypes, "noise_levels": RULE} | dict(how)
    if model.loras.asked:
        numerics["loras"] = model.loras.numerics()
    if model.source.pipeline:
        numerics["pipeline"] = dict(model.source.pipeline)
    return fingerprint(device, numerics, sorted(model.files.items()))


def read_again(
    journal: Journal, paths: Mapping[str, Path], now: Fingerprint
) -> tuple[Fingerprint, str]:
    """Return the fingerprint of today with checksums of the large files, where the job's has them:
    those that are still believed, or of every byte, read now. And how it was done, in a sentence.

    Raises:
        StorageError: a file cannot be read.
        CheckpointChanged: one does not keep still.
    """
    then, sums = journal.record.fingerprint.get("files", {}), Sums()
    known = {name: entry for name, entry in then.items() if SUM in entry and name in paths}
    same = [n for n, entry in known.items() if entry == now["files"][n] | {SUM: entry[SUM]}]
    found = {name: sums.of(paths[name]) for name in same}  # others differ by their samples
    how = f"the model's large files are those of the job's beginning ({how_told(found.values())})"
    return with_sums(now, found), how


def check_unfinished(journal: Journal) -> None:
    """Refuse a job that has nothing left to do.

    Raises:
        JournalError: it is done.
    """
    if journal.record.state == "done":
        raise JournalError(
            f"the job in {journal.folder} is done",
            found=str(journal.record.facts.get("output")),
            remedy="Remove it with `penstock jobs rm`.",
        )


def restored_request(journal: Journal) -> GenerationRequest:
    """Return the request of a job.

    Raises:
        JournalError: the record holds none.
    """
    values = {k: v for k, v in journal.record.request.items() if k not in _NOT_OF_THE_REQUEST}
    there = [name for name in PICTURES if values.get(name) is not None]
    pictures: dict[str, Any] = {"image": None}
    pictures |= {name: journal.folder / PICTURES[name] for name in there}
    try:
        grid = Grid(**values.pop("grid"))
        values = {**_BEFORE, **values}
        if values.get("after") is not None:
            values["after"] = Path(values["after"])
        return GenerationRequest(**(values | {"grid": grid} | pictures))
    except (KeyError, TypeError, RequestError) as error:
        raise JournalError(f"{journal.folder} holds no request", found=str(error)) from error


def with_own_shift(journal: Journal, request: GenerationRequest) -> GenerationRequest:
    """Return ``request`` with the flow shift that its job began with, where it names none: the
    official one of today may be another.

    Raises:
        JournalError: both generations of the sampler's state are damaged.
    """
    if request.shift is not None:
        return request
    state = journal.load_latest()
    return request if state is None else replace(request, shift=state.values.get("shift"))


def restored_plan(journal: Journal) -> Plan:
    """Return the plan of a job.

    Raises:
        JournalError: the record holds none.
    """
    try:
        return Plan.from_json(journal.record.plan)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise JournalError(f"{journal.folder} holds no plan", found=str(error)) from error


def restored_order(journal: Journal) -> Order:
    """Return where a job's video goes; a file there that it had finished itself may be replaced."""
    facts = journal.record.facts
    output = Path(facts["output"]) if isinstance(facts.get("output"), str) else None
    return Order(
        output=output,
        overwrite=bool(facts.get("overwrite")) or _is_own(output, facts.get("output_begun")),
        metadata=bool(facts.get("metadata", True)),
    )


def _is_own(output: Path | None, begun: object) -> bool:
    """Return whether the file at ``output`` is the one that the job was about to name so."""
    try:
        return output is not None and output.is_file() and stamp(output) == begun
    except (OSError, StorageError):
        return False


def check_conditions(
    journal: Journal,
    plan: Plan,
    now: Fingerprint,
    paths: Mapping[str, Path],
    *,
    steers: bool,
    allow_nonidentical: bool,
) -> tuple[str, ...]:
    """Return the differences between the conditions a job began under and those of today, as
    sentences.

    Args:
        journal: of the job.
        plan: under which it will go on.
        now: the fingerprint of today.
        paths: the files in it, by name.
        steers: there is an ``on_step``. A job that had one and replaced latents needs it again for
            the steps that remain.
        allow_nonidentical: differences are no error.

    Raises:
        FingerprintMismatch: something differs, and that is not allowed.
    """
    steered = bool(journal.record.facts.get("steered"))
    still = steered and (steers or journal.load_latents() is not None)
    then = {"plan": _rounding(restored_plan(journal)), "steered": steered}
    today = {"plan": _rounding(plan), "steered": still}
    differences = check_fingerprint(
        journal.record.fingerprint | then,
        now | today,
        paths,
        allow_nonidentical=allow_nonidentical,
    )
    return tuple(
        f"the result will not be identical: {field} was {old!r} and is {new!r}"
        for field, old, new in differences
    )


def check_picture(journal: Journal) -> None:
    """Refuse a damaged copy of a picture.

    Raises:
        JournalError: it is not what the request was made with.
    """
    for name, expected in pictures_in(journal.record.request).items():
        if stamp(journal.folder / name) != expected:
            raise JournalError(
                f"{journal.folder / name} is damaged",
                expected=str(expected),
                remedy="Put the original picture in its place, or start the job again.",
            )


def reserve_bytes(model: ModelFiles, request: GenerationRequest) -> int:
    """Return the disk space that the files of a job take at most."""
    shape = request.video_shape
    video = 3 * shape.frames * shape.height * shape.width
    picture = sum(path.stat().st_size for path in request.pictures)
    latents = 4 * math.prod(model.latent_shape(shape))
    states = GENERATIONS * (STATE_TENSORS * latents + HEADER_BYTES)
    return states + latents + model.kept_bytes(shape) + video + picture + 64 * HEADER_BYTES


def _rounding(plan: Plan) -> dict[str, Any]:
    """Return what of a plan alters rounding (`penstock.profiles.plan.rounding`)."""
    return {phase.name: rounding(phase) for phase in plan.phases if phase.name != PACKING}
