"""A job of any pipeline in its folder: what was asked, whether it can go on, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.engine.attach.calling import arguments_of
from penstock.engine.attach.diffusers_folder import Opened
from penstock.engine.attach.foreign_plan import TILED, CallPlan
from penstock.engine.attach.recorded import CallKeeper
from penstock.engine.media.claim import OutputClaim
from penstock.engine.run.fingerprint import Fingerprint, check_fingerprint, fingerprint
from penstock.engine.run.stored import Order, check_unfinished, read_again, restored_order
from penstock.engine.store.journal import HEADER_BYTES, JobRecord, Journal
from penstock.errors import JournalError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".h5")
"""What lies in folders besides what is used is mostly weights of other formats."""


@dataclass(frozen=True)
class Call:
    """A call as it was asked for.

    Attributes:
        pipeline_folder: of the pipeline, absolute.
        words: ``name=value``; pictures by their absolute path.
        seed: of the noise; None: any, where jobs are looked for.
        fps: of the file, as a fraction; None: what the call says.
        weight_format: of the denoiser's blocks; None: as they are.
        steps: of the sampler; 0: the pipeline names none.
    """

    pipeline_folder: str
    words: tuple[str, ...]
    seed: int | None
    fps: str | None
    weight_format: str | None
    steps: int

    def values(self) -> dict[str, Any]:
        """Return plain values, for the record."""
        return asdict(self) | {"words": list(self.words)}

    @classmethod
    def of(cls, record: JobRecord) -> Call:
        """Return the call of a job.

        Raises:
            JournalError: its record holds none.
        """
        try:
            call = cls(**record.request | {"words": tuple(record.request["words"])})
        except (KeyError, TypeError) as error:
            raise JournalError("the job's record holds no call", found=str(error)) from error
        kinds = {"pipeline_folder": (str,), "seed": (int,), "fps": (str, type(None)),
                 "weight_format": (str, type(None)), "steps": (int,)}  # fmt: skip
        wrong = [name for name, types in kinds.items() if type(getattr(call, name)) not in types]
        if wrong or not all(isinstance(word, str) for word in call.words):
            raise JournalError(
                "the job's record holds no call", found=f"illegal {', '.join(wrong) or 'words'}"
            )
        return call


def budgets_of(record: JobRecord) -> tuple[str, int, int]:
    """Return device, VRAM and RAM that a job was begun with.

    Raises:
        JournalError: its record does not tell.
    """
    found = (record.facts.get("device"), record.plan.get("vram_limit_bytes"),
             record.plan.get("ram_limit_bytes"))  # fmt: skip
    device, vram, ram = found
    if isinstance(device, str) and type(vram) is int and type(ram) is int:
        return device, vram, ram
    raise JournalError("the job's record holds no budgets", found=str(found))


def absolute(pipe: Any, pairs: list[str]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Return ``name=value`` words that mean the same in every folder, and the pictures in them."""
    known, words, pictures = arguments_of(pipe), [], {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if known[name].takes_picture and Path(text).is_file():
            pictures[name] = Path(text).absolute()
            pair = f"{name}={pictures[name]}"
        words.append(pair)
    return tuple(words), pictures


def files_of(folder: Path, opened: Opened, pictures: Mapping[str, Path]) -> dict[str, Path]:
    """Return all files that a call's result depends on, by name."""
    found = {f"picture {name}": path for name, path in pictures.items()}
    components = [
        folder / name for name, each in opened.pipe.components.items() if each is not None
    ]
    for place in (folder, *components):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_file() and path.suffix not in _WEIGHTS and place != folder:
                found[path.relative_to(folder).as_posix()] = path
            elif path.name.endswith("index.json") and path.is_file():
                found[path.name] = path
    for weights in opened.files.values():
        found |= {path.relative_to(folder).as_posix(): path for path in weights.files}
    return found


def conditions_now(
    opened: Opened, plan: CallPlan, fmt: str | None, place: torch.device, files: Mapping[str, Path]
) -> Fingerprint:
    """Return the fingerprint of a call."""
    numerics = {
        "pipeline": type(opened.pipe).__name__,
        "weight_format": fmt or "as stored",
        "vae_tiles": TILED in plan.notes,
    }
    return fingerprint(place, numerics, sorted(files.items()))


def begin(
    folder: Path,
    call: Call,
    plan: CallPlan,
    now: Fingerprint,
    order: Order,
    device: str,
    claim: OutputClaim | None,
) -> CallKeeper:
    """Make a job's folder; its disk space is claimed.

    Raises:
        StorageError: no space, or the folder cannot be written.
        JournalError, JobLocked: there is a job already.
    """
    assert plan.kept is not None
    journal = Journal.create(
        folder,
        call.values(),
        plan.to_json(),
        now,
        facts=order.facts() | {"device": device},
        reserve_bytes=plan.kept.disk_bytes + HEADER_BYTES,
    )
    return CallKeeper(journal, claim)


def resumed(
    journal: Journal,
    plan: CallPlan,
    now: Fingerprint,
    files: Mapping[str, Path],
    order: Order,
    claim: Callable[[], OutputClaim | None],
    *,
    allow_nonidentical: bool,
) -> tuple[CallKeeper, tuple[str, ...]]:
    """Return what keeps a job that goes on, and what its user is to be told.

    Raises:
        FingerprintMismatch: what determines the result has changed; names it.
        StorageError, CheckpointChanged: its files cannot be read.
        OutputError: another job is to write its output.
    """
    now, how = read_again(journal, files, now)
    differences = check_fingerprint(
        journal.record.fingerprint, now, files, allow_nonidentical=allow_nonidentical
    )
    told = tuple(
        f"the result will not be identical: {field} was {old!r} and is {new!r}"
        for field, old, new in differences
    )
    held = claim()
    journal.mark("running", plan=plan.to_json(), error=None, **order.facts())
    return CallKeeper(journal, held), (how, *told)


def order_of(journal: Journal, output: Path | None, *, force: bool) -> Order:
    """Return where the output of a job goes that is not done.

    Raises:
        JournalError: it is done, or names no output.
    """
    check_unfinished(journal)
    order = restored_order(journal)
    if output is not None:
        return Order(output, force)
    if order.output is None:
        raise JournalError("the job's record names no output", remedy="Give --output.")
    return Order(order.output, order.overwrite or force)
