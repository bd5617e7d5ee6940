"""The phases "vision" and "text": from a prompt, and pictures, to the states that the transformer
is conditioned on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.pictures import patches
from penstock.engine.families.minimax_h3.terms import TEXT_TOKENS
from penstock.engine.families.minimax_h3.text import config as configs
from penstock.engine.families.minimax_h3.text.kind import EMBEDDING
from penstock.engine.families.minimax_h3.text.language import (
    Presentation,
    embed,
    encode_layers,
    positions,
    present,
    rope,
)
from penstock.engine.families.minimax_h3.text.patches import LABEL, MARKS, PROCESSOR
from penstock.engine.families.minimax_h3.text.tower import see
from penstock.engine.run.stage import visits
from penstock.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from penstock.engine.model.component import Component
    from penstock.engine.run.events import PhaseMonitor
    from penstock.engine.run.stage import Stage

Picture = tuple[Tensor, tuple[int, int]]
"""Patches of a picture, and how many there are down and across."""


@dataclass(frozen=True)
class _Seen:
    """What the vision tower gives: for the places of the pictures' tokens, and what is added there
    after the first layers. On the CPU."""

    merged: Tensor
    features: list[Tensor]


def encode(stage: Stage, frames: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the states (1, n, d) of the prompt and of ``frames`` before it, and the tag of each
    row (n,).

    Args:
        frames: the pictures at the video's size, uint8 (h, w, 3).

    Raises:
        RequestError: the prompt is too long, or holds a mark of the model's own for pictures.
        CheckpointError: there are pictures, and the encoder's file has no vision tower.
    """
    pictures: list[Picture] = []
    if frames:
        processor = {**PROCESSOR, **stage.model.source.image_processor}
        check_processor(stage.model.parts.get("vision"), processor)
        pictures = [patches(frame, processor) for frame in frames]
    shown = presentation(stage, [grid for _, grid in pictures])
    seen = _look(stage, pictures) if pictures else None
    return _read(stage, shown, seen), torch.tensor(shown.tags, dtype=torch.long)


def presentation(stage: Stage, grids: Sequence[tuple[int, int]]) -> Presentation:
    """Return what the language model reads: the prompt verbatim, and before it each picture by
    name.

    Raises:
        RequestError: as `encode`.
    """
    labels = [LABEL.format(number) for number in range(1, len(grids) + 1)]
    texts = [stage.job.request.prompt, *labels]
    (prompt, *named), marks = stage.model.tokenizer.verbatim(texts, MARKS)
    if len(prompt) > TEXT_TOKENS:
        raise RequestError(
            "the prompt is too long",
            expected=f"{TEXT_TOKENS} tokens at most",
            found=str(len(prompt)),
            remedy="Shorten the prompt: penstock does not cut it.",
        )
    if grids and set(prompt) & set(marks):
        raise RequestError(
            "the prompt contains a reserved token",
            expected="none of " + ", ".join(MARKS),
            found="one of them",
            remedy="Leave it out.",
        )
    begin, pad, end = marks
    merge = stage.model.source.image_processor.get("merge_size", PROCESSOR["merge_size"])
    return present(prompt, named, grids, (begin, pad, end), merge)


def check_processor(component: Component | None, processor: Mapping[str, Any]) -> None:
    """Refuse pictures that the encoder cannot see as they would be prepared.

    Raises:
        CheckpointError: it has no vision tower, or one for other patches.
    """
    if component is None:
        raise CheckpointError(
            "the text encoder's file has no vision tower",
            expected="one that sees pictures",
            found="a language model alone",
            remedy="Use the encoder in transformers' or ComfyUI's files, or give no picture.",
        )
    tower = configs.vision(component.config) or {}
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
             "merge_size": "spatial_merge_size"}  # fmt: skip
    for name, entry in names.items():
        if processor[name] != tower[entry]:
            raise CheckpointError(
                "the picture processor does not suit the text encoder",
                expected=f"{name} {tower[entry]}",
                found=str(processor[name]),
                remedy="Copy processor and text encoder from one model.",
            )


def _look(stage: Stage, pictures: Sequence[Picture]) -> _Seen:
    component = stage.model.parts["vision"]
    with (
        stage.phase("vision", len(component.blocks), "layer") as (plan, phase),
        stage.rest(component) as module,
        stage.stream(component.blocks, plan.stream, phase, 1) as stream,
    ):
        given = [(pixels.to(stage.device, component.dtype), grid) for pixels, grid in pictures]
        layers = _counted(visits(stream, component, phase), phase)
        merged, features = see(module.model.visual, layers, given)
        return _Seen(merged.cpu(), [each.cpu() for each in features])


def _read(stage: Stage, shown: Presentation, seen: _Seen | None) -> Tensor:
    component: Component = stage.model.parts["text_encoder"]
    words = configs.language(component.config)
    with stage.phase("text", len(component.blocks), "layer") as (plan, phase):
        hidden = embed(
            shown,
            lambda rows: component.read_rows(EMBEDDING, rows),
            dtype=component.dtype,
            device=stage.device,
        )
        places, features = shown.seen(), []
        if seen is not None:
            hidden[0, torch.tensor(places, device=stage.device)] = seen.merged.to(hidden)
            features = [each.to(stage.device) for each in seen.features]
        waves = rope(positions(shown).to(stage.device), words, component.dtype)
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component, phase), phase)
            return encode_layers(layers, hidden, waves, places, features).cpu()


def _counted(blocks: Iterator[tuple[int, Any]], phase: PhaseMonitor) -> Iterator[tuple[int, Any]]:
    for index, block in blocks:
        yield index, block
        phase.advance()
