"""What a file or a folder is, for people and programs: `penstock inspect`.

Only headers are read, and torch is not imported: a file of 32 GB takes a fraction of a second."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.files.experts import FIRST, expert_of, partner_of
from penstock.engine.files.fields import read_object
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import (
    INDEXES,
    ModelSource,
    config_owner,
    locate,
    open_component,
    survey,
)
from penstock.engine.lora.inspect import LoraInspection, describe_lora, holds_lora
from penstock.errors import CheckpointError, NotRun, PenstockError, PickleRefused
from penstock.offload.checkpoint import find_checkpoint
from penstock.offload.files import looked_at
from penstock.units import format_bytes


@dataclass(frozen=True)
class Layers:
    """The parameters that are stored in one format."""

    format: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """One component, described.

    Attributes:
        component: transformer, text_encoder, vae or image_encoder.
        family: the model and its size.
        naming: whose names the tensors bear.
        format: of most parameters.
        layers: each format with what is stored in it, the largest first.
        missing, unknown, misshaped: what is wrong, by name; all empty for a file that can be used.
        extras: tensors beside the model, such as a tokenizer.
        arguments: what to add to ``penstock generate`` to use it; empty if it cannot be used.
    """

    path: Path
    component: str
    family: str
    naming: str
    format: str
    parameters: int
    nbytes: int
    layers: tuple[Layers, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshaped: tuple[str, ...]
    extras: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether penstock can run it."""
        return not (self.missing or self.unknown or self.misshaped)

    def lines(self) -> list[str]:
        """Describe it in lines for a terminal."""
        lines = [
            f"{self.path}",
            f"  {self.component.replace('_', ' ')}: {self.family}, names as in {self.naming}",
            f"  {self.parameters / 1e9:.3f} B parameters, {format_bytes(self.nbytes)}, "
            f"{self.format}",
        ]
        lines += [
            f"    {row.format:<16} {row.tensors:>5} tensors  {row.parameters / 1e6:>9.1f} M"
            f"  {format_bytes(row.nbytes)}"
            for row in self.layers
        ]
        for what in ("missing", "unknown", "misshaped"):
            names: tuple[str, ...] = getattr(self, what)
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                lines.append(f"  {len(names)} {what}: {shown}")
        if self.extras:
            lines.append(f"  beside the model: {', '.join(self.extras)}")
        if self.arguments:
            lines.append(f"  use it: penstock generate {shlex.join(self.arguments)}")
        return lines


@dataclass(frozen=True)
class ModelInspection:
    """A file, or all components of a model.

    Attributes:
        problem: why a folder's parts make no model; empty if they do or a single file was given.
        arguments: what to add to ``penstock generate`` to use the whole; may be empty.
        completed: the same for a folder that lacks parts, with FILE for each of them.
        notes: of each part that is lacking, why; and files that were passed over.
    """

    path: Path
    components: tuple[Inspection, ...]
    problem: str
    arguments: tuple[str, ...]
    completed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Describe it in lines for a terminal."""
        lines = [line for part in self.components for line in part.lines()]
        lines += self.notes
        if self.completed:
            lines.append(f"with what it lacks: penstock generate {shlex.join(self.completed)}")
        if self.problem:
            lines.append(f"not a whole model: {self.problem}")
        elif len(self.components) > 1 and not self.problem:
            lines.append(f"use it: penstock generate {shlex.join(self.arguments)}")
        return lines


def inspect(path: Path) -> ModelInspection | LoraInspection:
    """Describe a file, an index, a component's folder, a model's folder or a LoRA.

    Raises:
        CheckpointError: nothing there is a component of a model that is run.
    """
    with looked_at(path):
        return _inspect(path.expanduser().absolute())  # hints hold wherever they are read


def _inspect(path: Path) -> ModelInspection | LoraInspection:
    if holds_lora(path):
        return describe_lora(path)
    if path.is_dir() and not _is_component(path):
        return _inspect_model(path)
    part = describe(open_component(path))
    return ModelInspection(path, (part,), "", part.arguments)


def _is_component(folder: Path) -> bool:
    """Return a folder of one component, as diffusers and transformers save it."""
    config = folder / "config.json"
    if any((folder / index).exists() for index in INDEXES) or not config.exists():
        return False
    if config_owner(read_object(config)) is None:
        return False
    try:
        find_checkpoint(folder)
    except CheckpointError:
        return bool(list(folder.glob("*.gguf")))
    return True


def _inspect_model(folder: Path) -> ModelInspection:
    arguments = ("--model", str(folder))
    try:
        source: ModelSource = locate(folder)
    except PenstockError as error:
        return _incomplete(folder, error, arguments)
    parts = tuple(describe(part, arguments) for part in source.components())
    return ModelInspection(folder, parts, "", arguments, (), source.notes)


def _incomplete(folder: Path, error: PenstockError, arguments: tuple[str, ...]) -> ModelInspection:
    """Return what can be described of a folder that is no whole model, and what would make it one.

    Raises:
        PenstockError: ``error``, where nothing can be, or the model is known and not run.
    """
    if isinstance(error, NotRun):
        raise error
    try:
        found = survey(folder)
    except CheckpointError:
        raise error from None
    parts = tuple(describe(part) for part in found.values() if isinstance(part, ComponentSource))
    lacking = {name: part for name, part in found.items() if isinstance(part, CheckpointError)}
    if not parts:
        raise error
    notes = tuple(f"{name.replace('_', ' ')}: {_why(part)}" for name, part in lacking.items())
    flags = [word for name in lacking for word in ("--" + name.replace("_", "-"), "FILE")]
    return ModelInspection(folder, parts, str(error), (), (*arguments, *flags), notes)


def _why(error: CheckpointError) -> str:
    """Return a pickle's refusal in short: what stands in the way."""
    return error.what if isinstance(error, PickleRefused) else str(error)


def describe(source: ComponentSource, arguments: tuple[str, ...] = ()) -> Inspection:
    """Describe an opened component.

    Args:
        arguments: how `generate` is told of it, if not by the component's own flag.
    """
    usable = not (source.missing or source.unknown or source.misshaped)
    flag = "--" + source.component.replace("_", "-")
    own = arguments or (flag, str(source.raw.path))
    title, expert = source.title, expert_of(source.raw) if source.component == FIRST else None
    if expert is not None and not arguments:
        title = f"one of two transformers, for {expert} noise, shaped as {title}"
        other = str(partner_of(source.raw.path) or "FILE")
        pair = (str(source.raw.path), other) if expert == "high" else (other, str(source.raw.path))
        own = ("--transformer", pair[0], "--transformer-2", pair[1])
    return Inspection(
        path=source.raw.path,
        component=source.component,
        family=title,
        naming=source.naming,
        format=source.label(),
        parameters=source.parameters,
        nbytes=source.nbytes,
        layers=_layers(source),
        missing=source.missing,
        unknown=source.unknown,
        misshaped=source.misshaped,
        extras=tuple(source.extras),
        arguments=own if usable else (),
    )


def _layers(source: ComponentSource) -> tuple[Layers, ...]:
    shapes: Mapping[str, tuple[int, ...]] = source.shapes
    rows: dict[str, Layers] = {}
    for name, stored in source.weights.items():
        row = rows.get(stored.label, Layers(stored.label, 0, 0, 0))
        rows[stored.label] = Layers(
            stored.label,
            row.tensors + 1,
            row.parameters + math.prod(shapes[name]),
            row.nbytes + stored.nbytes,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.nbytes))
