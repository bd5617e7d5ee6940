"""The models of a loaded pipeline written as a folder that penstock opens, and their own weights
let go meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.attach.away import AwayWeight
from penstock.engine.attach.blocks import Slot
from penstock.engine.attach.livepack import LivePack, plan_live
from penstock.engine.attach.surgery import Emptied, restore, specs_of
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.packs.names import FILE_NAMES
from penstock.engine.packs.plan import runs_of
from penstock.engine.store.durable import FileOps, storing, write_atomically

_PREFIXES = {"image_encoder": "vision_model."}
"""What files put before the names that the class has."""


def write_models(
    pipe: Any,
    kinds: Mapping[str, ComponentKind],
    folder: Path,
    stack: ExitStack,
    returns: Callable[[], bool],
) -> int:
    """Write the models of ``pipe`` that are of ``kinds`` to ``folder`` and let their weights go;
    ``stack`` undoes it, if ``returns`` says that the weights are wanted back.

    Gives the bytes of the packs.

    Raises:
        UsageError: weights that cannot be written as they are; names one.
        StorageError: the disk is full or fails.
    """
    models = {name: model for name in kinds
              if isinstance(model := getattr(pipe, name, None), nn.Module)}  # fmt: skip
    runs = {name: _runs(kinds[name], model) for name, model in models.items()}
    layouts = {name: plan_live(specs_of(runs[name])) for name in models}
    packs = {}
    for name, layout in layouts.items():
        FileOps().mkdir(folder / name)
        own = runs[name]

        def values(run: str, own: Mapping[str, Mapping[str, Tensor]] = own) -> Iterator[Tensor]:
            yield from own[run].values()

        packs[name] = LivePack(folder / name / FILE_NAMES[kinds[name].made_by[0]], layout, values)
        stack.callback(packs[name].close)
    _write_sides(pipe, models, folder)
    for name, model in models.items():
        slots = _slots(name, model)
        emptied = Emptied(packs[name], runs[name])

        def give_back(emptied: Emptied = emptied, slots: list[Slot] = slots) -> None:
            if returns():
                restore([slots])
                emptied.fill()

        stack.callback(give_back)
        for slot in slots:
            slot.put(None)
    return sum(layout.file_bytes for layout in layouts.values())


def _runs(kind: ComponentKind, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters as a pack of that component groups them, under the names that files
    have."""
    prefix = _PREFIXES.get(kind.name, "")
    parameters = {key.removeprefix(prefix): p for key, p in model.named_parameters()}
    names = runs_of(kind, {key: tuple(p.shape) for key, p in parameters.items()})
    return {run: {prefix + key: parameters[key] for key in keys} for run, keys in names.items()}


def _slots(name: str, model: nn.Module) -> list[Slot]:
    return [
        Slot(owner, leaf, "", AwayWeight(p, p.device, f"{name}: {path}.{leaf}"), p)
        for path, owner in model.named_modules()
        for leaf, p in owner._parameters.items()
        if p is not None
    ]


def _write_sides(pipe: Any, models: Mapping[str, nn.Module], folder: Path) -> None:
    ops = FileOps()
    for name, model in models.items():
        config: Any = model.config
        content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        content |= {"_class_name": type(model).__name__}
        write_atomically(ops, folder / name / "config.json", [_json(content)])
    with storing(ops, folder / "tokenizer"):
        pipe.tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": type(pipe).__name__}
    write_atomically(ops, folder / "model_index.json", [_json(index)])


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, default=_plain).encode()


def _plain(value: object) -> object:
    """Return the config entries that JSON has no form for (a dtype): penstock reads none of
    them."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)
