"""What a LoRA file is, for people and programs. Free of torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from penstock.engine.lora.file import LoraFile, open_lora
from penstock.engine.lora.keys import foreign_kind, is_lora
from penstock.offload.checkpoint import Checkpoint
from penstock.units import format_bytes

_SPELLED = MappingProxyType(
    {
        "lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA",
        "oft": "OFT", "boft": "BOFT", "diff": "differences", "set": "whole weights",
    }
)  # fmt: skip


@dataclass(frozen=True)
class LoraInspection:
    """A LoRA file, described.

    Attributes:
        family: the model it was made for, as far as its tensors tell.
        styles: whose key names: diffusers, PEFT, ComfyUI, Kohya or bare.
        kinds: number of changed weights by what changes them (lora, dora, lokr, ...).
        ranks: number of low-rank layers by rank.
        scales: alpha / rank, each value once; 1.0 where the file says nothing.
        differences: weights and biases that are changed by whole differences.
        dtypes: of its tensors.
        unknown: keys of which nothing is known, or with which nothing can be done: left out.
        kind: what else the file seems to be, or None.
        arguments: what to add to ``penstock generate`` to use it; empty if it cannot be used.
    """

    path: Path
    family: str
    styles: tuple[str, ...]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: tuple[float, ...]
    differences: int
    dtypes: tuple[str, ...]
    nbytes: int
    unknown: tuple[str, ...]
    kind: str | None
    arguments: tuple[str, ...]

    def lines(self) -> list[str]:
        """Describe it in lines for a terminal."""
        if not self.arguments:
            what = self.kind or "a LoRA of another model"
            found = f"{len(self.unknown)} keys, none of a known layer: {self._unknown}"
            return [f"{self.path}", f"  {what}, not run: {found}"]
        ranks = ", ".join(f"rank {rank} ({count} layers)" for rank, count in self.ranks.items())
        scales = ", ".join(f"{scale:g}" for scale in self.scales[:4])
        kinds = ", ".join(f"{count} {_SPELLED[kind]}" for kind, count in self.kinds.items())
        lines = [
            f"{self.path}",
            f"  LoRA for {self.family}, names as in {' and '.join(self.styles) or 'nothing known'}",
            f"  {kinds or 'nothing'}: {ranks or 'no low-rank layers'}, alpha / rank {scales or '-'}"
            + (", ..." if len(self.scales) > 4 else ""),
            f"  {self.differences} whole differences of weights and biases, "
            f"{format_bytes(self.nbytes)} in {', '.join(self.dtypes) or 'nothing'}",
        ]
        if self.unknown:
            kind = f" ({self.kind})" if self.kind else ""
            lines.append(f"  {len(self.unknown)} unknown keys: {self._unknown}{kind}, left out")
        return [*lines, f"  use it: penstock generate ... {shlex.join(self.arguments)}"]

    @property
    def _unknown(self) -> str:
        return ", ".join(self.unknown[:3]) + (", ..." if len(self.unknown) > 3 else "")


def holds_lora(path: Path) -> bool:
    """Return whether ``path`` is a LoRA's .safetensors, or a folder as PEFT writes it."""
    if path.is_dir():
        return (path / "adapter_config.json").exists()
    if path.suffix.lower() != ".safetensors" or not path.exists():
        return False
    with Checkpoint.open(path) as found:
        return is_lora(found)


def describe_lora(path: Path) -> LoraInspection:
    """Describe a LoRA file.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    file: LoraFile = open_lora(path)
    entries = [entry for layer in file.layers.values() for entry in layer.entries()]
    low_rank = [layer for layer in file.layers.values() if layer.rank]
    whole = file.kinds["diff"] + sum(la.bias is not None for la in file.layers.values())
    unknown = (*file.unknown, *(name for stray in file.strays for name in stray.names))
    return LoraInspection(
        path=path,
        family=file.family,
        styles=file.styles,
        kinds=dict(file.kinds.most_common()),
        ranks=dict(file.ranks.most_common()),
        scales=tuple(sorted({layer.scale for layer in low_rank})),
        differences=whole,
        dtypes=tuple(sorted({entry.dtype for entry in entries})),
        nbytes=file.nbytes,
        unknown=unknown,
        kind=foreign_kind(unknown),
        arguments=("--lora", str(path)) if file.layers else (),
    )
