"""A model opened by its headers alone: its networks, its manifest, and how it was asked for.

Where a model lies and how its files name and store the weights is found by
`penstock.engine.files.locate`; which networks it has, and what the planner knows of them, its
family says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from penstock.engine.files.experts import SECOND
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import Files, ModelSource, locate
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.lora.file import Lora
from penstock.engine.lora.place import PlacedLoras
from penstock.engine.model.component import Component
from penstock.engine.model.grid import Grid
from penstock.engine.model.official import Official
from penstock.engine.model.opening import Opening
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import Manifest
from penstock.profiles.plan import Origin
from penstock.quant.paths import Computing, Scratch

Own = TypeVar("Own", bound="ModelFiles")


@dataclass(frozen=True)
class ModelFiles:
    """A model, wherever its parts lie. A family has a class of its own beneath this one.

    Attributes:
        opening: how it was asked for.
        source: where its parts were found.
        parts: its networks by their names in plans, the one that streams first.
        manifest: what the planner knows of it; `installed` says it for a device.
        scratch: that its quantised linears decode into.
        loras: applied beside the weights of the network that streams.
    """

    opening: Opening
    source: ModelSource
    parts: Mapping[str, Component]
    manifest: Any
    scratch: Scratch
    loras: PlacedLoras

    @property
    def streamed(self) -> Component:
        """The network whose blocks stream while latents are denoised."""
        return next(iter(self.parts.values()))

    @property
    def streaming(self) -> tuple[str, ...]:
        """Names of the networks whose blocks stream while latents are denoised, in their order."""
        first = next(iter(self.source.parts))
        return (first, SECOND) if SECOND in self.source.parts else (first,)

    @property
    def grid(self) -> Grid:
        """The sizes that the model can represent."""
        raise NotImplementedError

    @property
    def image_to_video(self) -> bool:
        """Whether a conditioning picture is needed."""
        return bool(self.manifest.image_to_video)

    def flow_shift(self, width: int, height: int, asked: float | None) -> float:
        """Return ``asked``, or the noise schedule's official shift for a video of that size."""
        return self.official.flow_shift(width, height, asked)

    def latent_shape(self, shape: VideoShape) -> tuple[int, ...]:
        """Return the shape of the latents of a video: (1, channels, frames, height, width)."""
        raise NotImplementedError

    def kept_bytes(self, shape: VideoShape) -> int:
        """Return the disk space that a kept job takes at most for what its phases leave."""
        raise NotImplementedError

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of requests, as the model's folder states them."""
        return self.source.defaults

    @property
    def official(self) -> Official:
        """Of requests, as the model was released with."""
        return cast("Official", self.manifest)

    @property
    def origin(self) -> str:
        """Where the model is, for messages."""
        return self.source.origin

    @property
    def files(self) -> dict[str, Path]:
        """Every file that a result depends on, by component and name."""
        found: dict[str, Path] = {}
        for part in self.source.components():
            config = part.raw.path / "config.json"
            paths = [*part.raw.stamps, *([config] if config.exists() else [])]
            found |= {f"{part.component}/{path.name}": path for path in paths}
        tokenizer = self.source.tokenizer
        if isinstance(tokenizer, Path):
            inside = tokenizer.iterdir() if tokenizer.is_dir() else [tokenizer]
            found |= {f"tokenizer/{path.name}": path for path in inside if path.is_file()}
        loras = [lora for part in self.loras.every for lora in part.files]
        for index, lora in enumerate(loras):
            found |= {f"lora/{index}/{part}": path for part, path in enumerate(lora.file.stamps)}
        return found

    @property
    def notices(self) -> tuple[str, ...]:
        """What was passed over or left out in opening it."""
        return (*self.source.notes, *self.loras.notices)

    def origins(self) -> tuple[Origin, ...]:
        """Return its LoRAs and what is to be said of its files, for plans."""
        notes = tuple(Origin("note", text, "files") for text in self.notices)
        return (*self.loras.origins(), *notes)

    @property
    def tokenizer(self) -> Tokenizer:
        """The text encoder's tokenizer; nothing of it is read yet."""
        return Tokenizer(self.source.tokenizer)

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        files: Files | None = None,
        loras: Sequence[Lora] = (),
    ) -> ModelFiles:
        """Describe a model without reading a weight.

        Args:
            model, files: as `penstock.engine.files.locate.locate` takes them.
            loras: to apply beside the weights of the network that streams.

        Raises:
            CheckpointError: no model of a family, or one that penstock does not run.
            HeaderError, PickleRefused, TensorMismatch: a component's files cannot be used.
        """
        source = locate(model, files)
        second = source.parts.get(SECOND)
        placed = PlacedLoras.open(source.streamed, loras, source.lora_folders, second)
        family = cast("ModelFamily", source.family)
        parts = family.components(source, placed)
        computing = Computing(Scratch(0, "cpu"))
        return family.MODEL(
            opening=Opening(None if model is None else str(model), files or Files(), placed.asked),
            source=source,
            parts=parts,
            manifest=family.manifest(parts, computing, source.pipeline),
            scratch=computing.scratch,
            loras=placed,
        )

    def installed(self: Own, computing: Computing) -> Own:
        """Return this model with its quantised linears computing as ``computing`` says, and the
        manifest that states what they take so. Once a model: the linears stay as they are made."""
        for part in self.components():
            part.install(computing)
        family, pipeline = cast("ModelFamily", self.source.family), self.source.pipeline
        manifest = family.manifest(self.parts, computing, pipeline)
        return replace(self, manifest=manifest, scratch=computing.scratch)

    def with_streamed(self: Own, *sources: ComponentSource) -> Own:
        """Return this model with other networks that stream, one for each of `streaming`; to be
        `installed` before it computes."""
        family, placed = cast("ModelFamily", self.source.family), []
        found, parts = dict(self.source.parts), dict(self.parts)
        inside = (next(iter(parts)), SECOND)
        for name, own, old, source in zip(
            self.streaming, inside, self.loras.every, sources, strict=False
        ):
            found[name] = replace(source, kind=self.source.parts[name].kind)
            placed.append(replace(old, source=found[name], second=None))
            parts[own] = family.streamed(found[name], placed[-1])
        loras = replace(placed[0], second=placed[1] if len(placed) > 1 else None)
        return replace(self, source=replace(self.source, parts=found), parts=parts, loras=loras)

    def components(self) -> tuple[Component, ...]:
        """Return all networks of the model."""
        return tuple(self.parts.values())

    def close(self) -> None:
        """Close the files."""
        for component in self.components():
            component.checkpoint.close()


class ModelFamily(Protocol):
    """What a family's module ``family`` offers to this room, beside `Family`."""

    MODEL: type[ModelFiles]
    """Its models."""

    def streamed(self, source: ComponentSource, loras: PlacedLoras) -> Component:
        """Return the network that streams, with LoRAs beside its weights."""

    def components(self, source: ModelSource, loras: PlacedLoras) -> dict[str, Component]:
        """Return all networks by their names in plans, the one that streams first."""

    def manifest(
        self, parts: Mapping[str, Component], computing: Computing, pipeline: Mapping[str, Any]
    ) -> Manifest:
        """Return what the planner knows of these networks, computing as ``computing`` says;
        ``pipeline`` is that of their `ModelSource`."""
