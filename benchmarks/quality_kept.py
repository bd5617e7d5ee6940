"""What a quality run has found so far, clip by clip, so that one that was cut short goes on.

The JSON file holds sums over each clip, from which the table is made; beside it a folder
(``FILE.work``) holds the reference's latents and frames, and packs, until the table is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.engine.store.durable import FileOps, write_atomically
from penstock.errors import UsageError


class Kept:
    """The records of a run, written after every addition.

    Args:
        path: of the JSON file; read if it is there.
        recipe: what the figures hold for; a file of another one is refused.

    Raises:
        UsageError: ``path`` holds another run's figures, or no figures at all.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        self.path, self.work = path, path.with_name(path.name + ".work")
        # As it will be read back: tuples become lists.
        self._recipe = json.loads(json.dumps(recipe))
        self._ways: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._ways = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            recipe, ways = found["recipe"], found["ways"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path} holds no figures of a quality run",
                found=str(error),
                remedy="Name another file, or remove this one",
            ) from error
        differ = [key for key, value in self._recipe.items() if recipe.get(key) != value]
        if differ:
            raise UsageError(
                f"{self.path} holds the figures of another run",
                expected=f"the same {', '.join(differ)}",
                found=str({key: recipe.get(key) for key in differ}),
                remedy="Name another file, or remove this one",
            )
        return dict(ways)

    def facts(self, way: str) -> dict[str, Any]:
        """What is known of ``way`` beside its clips; empty if nothing."""
        return {key: value for key, value in self._ways.get(way, {}).items() if key != "clips"}

    def set_facts(self, way: str, facts: Mapping[str, Any]) -> None:
        """Remember ``facts`` of ``way``."""
        self._ways.setdefault(way, {"clips": {}}).update(facts)
        self._write()

    def clip(self, way: str, index: int) -> dict[str, Any] | None:
        """The record of one clip, if there is one."""
        found: dict[str, Any] | None = self._ways.get(way, {}).get("clips", {}).get(str(index))
        return found

    def add_clip(self, way: str, index: int, record: Mapping[str, Any]) -> None:
        """Remember one clip."""
        self._ways.setdefault(way, {"clips": {}})["clips"][str(index)] = dict(record)
        self._write()

    def reference(self, index: int) -> dict[str, Tensor] | None:
        """Latents and frames of the reference's clip, if they are there."""
        path = self._reference(index)
        return load_file(path) if path.exists() else None

    def set_reference(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep latents and frames of the reference's clip."""
        path = self._reference(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new)
        new.replace(path)

    def _reference(self, index: int) -> Path:
        return self.work / "reference" / f"{index}.safetensors"

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"recipe": self._recipe, "ways": self._ways}, indent=1)
        write_atomically(FileOps(), self.path, [text.encode()])


@dataclass(frozen=True)
class Difference:
    """Two arrays compared, as sums that can be added up."""

    count: int
    error: float
    product: float
    found_square: float
    wanted_square: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Tensor, wanted: Tensor) -> Difference:
        """``found`` against ``wanted``, of one shape."""
        ours, theirs = found.double().flatten(), wanted.double().flatten()
        return cls(
            count=theirs.numel(),
            error=float((ours - theirs).square().sum()),
            product=float(ours @ theirs),
            found_square=float(ours @ ours),
            wanted_square=float(theirs @ theirs),
            low=float(theirs.min()),
            high=float(theirs.max()),
        )

    @classmethod
    def total(cls, parts: Iterable[Difference]) -> Difference:
        """Of several arrays as one."""
        each = list(parts)
        sums = {
            name: math.fsum(getattr(part, name) for part in each)
            for name in ("error", "product", "found_square", "wanted_square")
        }
        return cls(
            count=sum(part.count for part in each),
            low=min(part.low for part in each),
            high=max(part.high for part in each),
            **sums,
        )

    @property
    def cosine(self) -> float:
        """Of all values as one vector."""
        return self.product / math.sqrt(self.found_square * self.wanted_square)

    def psnr(self, span: float | None = None) -> float:
        """Peak signal to noise in dB over ``span`` (None: the range of what was wanted); infinite
        where nothing differs."""
        span = self.high - self.low if span is None else span
        return math.inf if self.error == 0 else 10 * math.log10(span**2 * self.count / self.error)
