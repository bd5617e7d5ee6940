"""LoRA files: opened by their headers, checked against the model, and nothing read but alphas.

Free of torch, so that a file can be described without it. What is added to the model's weights is
`penstock.engine.lora.place`'s (beside them) and `penstock.engine.lora.merge`'s (into a pack).
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.families.wan.config import SIZES
from penstock.engine.files.fields import (
    Field,
    check_fields,
    flag,
    maybe,
    number,
    parse_object,
    read_object,
)
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.source import read_bytes
from penstock.engine.lora.keys import Part, foreign_kind, is_lora, parse_key
from penstock.errors import CheckpointError, TensorMismatch, UsageError, brief
from penstock.offload.checkpoint import Checkpoint, TensorEntry
from penstock.offload.files import FileStamp, looked_at

_LARGEST = 1e300
FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}
_METADATA = "lora_adapter_metadata"
_ALPHA = number(-1e6, 1e6)
_PEFT = {
    "lora_alpha": _ALPHA,
    "alpha_pattern": maybe(Field("an object of finite numbers from -1e+06 to 1e+06", lambda value: (
        isinstance(value, dict) and all(map(_ALPHA.fits, value.values()))
    ))),
    "use_rslora": maybe(flag()),
    "use_dora": maybe(flag()),
}  # fmt: skip
_PLAIN_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class Lora:
    """A LoRA to apply.

    Attributes:
        path: a .safetensors file, or a folder with one.
        strength: what its change of the weights is multiplied by; 1.0 is as trained.

    Raises:
        UsageError: the strength is not a finite number.
    """

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        strength: object = self.strength
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not (number and abs(self.strength) < _LARGEST):
            raise UsageError(
                f"illegal strength of {self.path}",
                expected="a finite number",
                found=brief(strength),
                remedy="1.0 is as trained",
            )

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From ``FILE`` or ``FILE:STRENGTH``; a colon that no number follows is the path's.

        Raises:
            UsageError: as the class.
        """
        path, colon, tail = text.rpartition(":")
        try:
            return cls(Path(path), float(tail)) if colon and path else cls(Path(text))
        except ValueError:
            return cls(Path(text))


def as_loras(given: Sequence[Lora | str | Path]) -> tuple[Lora, ...]:
    """What was given as `Lora`s: a text is read as `Lora.parse` does, a path has strength 1."""
    return tuple(
        Lora.parse(each)
        if isinstance(each, str)
        else Lora(each)
        if isinstance(each, Path)
        else each
        for each in given
    )


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one module.

    Attributes:
        module: diffusers' name of it; of a bare parameter (a modulation table), its own.
        down, up: (rank, in features) and (out features, rank): ``scale * up @ down`` is added.
        scale: alpha / rank.
        diff: added to the weight as it is.
        bias: added to the bias, times ``bias_scale``.
    """

    module: str
    down: TensorEntry | None = None
    up: TensorEntry | None = None
    scale: float = 1.0
    diff: TensorEntry | None = None
    bias: TensorEntry | None = None
    bias_scale: float = 1.0

    @property
    def rank(self) -> int:
        """0 where there is no low-rank part."""
        return 0 if self.down is None else self.down.shape[0]

    def entries(self) -> tuple[TensorEntry, ...]:
        """Its tensors."""
        parts = (self.down, self.up, self.diff, self.bias)
        return tuple(entry for entry in parts if entry is not None)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as its header describes it.

    Attributes:
        path: as it was given.
        styles: whose key names, the most frequent first.
        layers: by module.
        unknown: keys of which nothing is known.
        stamps: the file as it was when its header was read.
    """

    path: Path
    styles: tuple[str, ...]
    layers: Mapping[str, LoraLayer]
    unknown: tuple[str, ...]
    stamps: Mapping[Path, FileStamp] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are applied."""
        return sum(e.nbytes for layer in self.layers.values() for e in layer.entries())

    @property
    def ranks(self) -> Counter[int]:
        """Number of low-rank layers by rank."""
        return Counter(layer.rank for layer in self.layers.values() if layer.rank)

    @property
    def family(self) -> str:
        """The model it was made for, as far as its tensors tell."""
        return _family(self.layers)

    def check(self, source: ComponentSource) -> None:
        """Refuse what cannot be applied to the transformer ``source``.

        Raises:
            CheckpointError: unknown keys, named, with their count.
            TensorMismatch: it was made for another model.
        """
        self.check_keys()
        shapes = source.shapes
        wrong = [
            (entry.name, expected, entry.shape)
            for layer in self.layers.values()
            for entry, expected in _expected(layer, shapes)
            if entry.shape != expected
        ]
        if wrong:
            name, wanted, found = wrong[0]
            raise TensorMismatch(
                f"{self.path} is a LoRA for {self.family}, and this model is {source.title}: "
                f"{len(wrong)} tensors do not fit",
                expected=f"no {name}" if wanted is None else f"{name} of shape {list(wanted)}",
                found=str(list(found)),
                remedy="Use a LoRA that was made for this model.",
            )

    def check_keys(self) -> None:
        """Refuse a file that is not wholly understood.

        Raises:
            CheckpointError: names the first unknown key and their count.
        """
        if self.unknown or not self.layers:
            raise _unknown(self.path, self.unknown, len(self.layers))


def parameters_of(layer: LoraLayer, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Names of the weight and of the bias that ``layer`` changes; the weight of a bare parameter is
    the parameter."""
    weight = f"{layer.module}.weight"
    bare = weight not in shapes and layer.module in shapes
    return layer.module if bare else weight, f"{layer.module}.bias"


def _expected(
    layer: LoraLayer, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[TensorEntry, tuple[int, ...] | None]]:
    """The shape that each tensor must have beside the model's own; None: nothing belongs there."""
    weight_name, bias_name = parameters_of(layer, shapes)
    weight, bias = shapes.get(weight_name), shapes.get(bias_name)
    found: list[tuple[TensorEntry, tuple[int, ...] | None]] = []
    if layer.down is not None and layer.up is not None:
        outer = None if weight is None or len(weight) < 2 else weight
        ones = () if outer is None else (1,) * (len(outer) - 2)
        found.append((layer.down, None if outer is None else (layer.rank, *outer[1:])))
        found.append((layer.up, None if outer is None else (outer[0], layer.rank, *ones)))
    if layer.diff is not None:
        found.append((layer.diff, weight))
    if layer.bias is not None:
        found.append((layer.bias, bias))
    return found


def open_lora(path: Path) -> LoraFile:
    """Read the header of a LoRA file, and its alphas.

    Raises:
        PickleRefused, HeaderError: as for any checkpoint.
        CheckpointError: no LoRA, or a damaged one: half a pair, ranks that differ, integers.
    """
    path = path.expanduser()
    with looked_at(path):
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist", expected="a LoRA's .safetensors", remedy="Check the path."
            )
    with Checkpoint.open(path) as found:
        entries, metadata, stamps = dict(found), dict(found.metadata), dict(found.files)
    if not is_lora(entries):
        raise CheckpointError(
            f"{path} is no LoRA",
            expected="tensors such as ...lora_A.weight, ...lora_down.weight or ...diff",
            found=next(iter(entries), "no tensors"),
            remedy="A model's own file goes to --model or --transformer.",
        )
    grouped, styles, unknown = _group(path, entries)
    alphas = _Alphas(path, metadata, styles.most_common(1)[0][0] if styles else "")
    layers = {name: _layer(path, name, parts, alphas) for name, parts in grouped.items()}
    order = tuple(style for style, _ in styles.most_common())
    return LoraFile(path, order, layers, tuple(unknown), stamps)


_Parts = dict[str, TensorEntry]


def _group(
    path: Path, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, _Parts], Counter[str], list[str]]:
    grouped: dict[str, _Parts] = {}
    styles: Counter[str] = Counter()
    unknown: list[str] = []
    for key, entry in entries.items():
        part: Part | None = parse_key(key)
        if part is None:
            unknown.append(key)
            continue
        role = "diff" if part.role == "diff_m" else part.role
        parts = grouped.setdefault(part.module, {})
        if role in parts:
            raise _damaged(path, f"one {role} of {part.module}", f"{parts[role].name} and {key}")
        parts[role] = entry
        styles[part.style] += 1
    return grouped, styles, unknown


def _layer(path: Path, module: str, parts: _Parts, alphas: _Alphas) -> LoraLayer:
    for role, entry in parts.items():
        if role != "alpha" and entry.dtype not in FLOATS:
            raise _damaged(path, f"{entry.name} in {', '.join(FLOATS)}", entry.dtype)
    down, up = parts.get("down"), parts.get("up")
    if (down is None) != (up is None) or (down is None and {"alpha", "up_bias"} & parts.keys()):
        whole = next(iter(parts.values())).name
        raise _damaged(path, f"both matrices of {module}", f"{whole} alone")
    scale = 1.0
    if down is not None and up is not None:
        if len(down.shape) < 2 or down.shape[:1] != up.shape[1:2] or not down.shape[0]:
            found = f"{list(down.shape)} and {list(up.shape)}"
            raise _damaged(path, f"matrices of {module} that share a rank of 1 or more", found)
        scale = alphas.scale(module, down.shape[0], parts.get("alpha"))
    if {"diff_b", "up_bias"} <= parts.keys():
        raise _damaged(path, f"one change of the bias of {module}", "two")
    return LoraLayer(
        module=module,
        down=down,
        up=up,
        scale=scale,
        diff=parts.get("diff"),
        bias=parts.get("diff_b", parts.get("up_bias")),
        bias_scale=scale if "up_bias" in parts else 1.0,
    )


class _Alphas:
    """alpha / rank of each layer: from the file's tensors, else from what PEFT says of it."""

    def __init__(self, path: Path, metadata: Mapping[str, str], style: str) -> None:
        self._path = path
        self._config = _peft_config(path, metadata, style)
        if self._config.get("use_dora"):
            raise _unknown(path, ("use_dora",), 0)
        # By the end of a module's name that each holds of, with its place: the first one counts
        self._patterns: dict[str, tuple[int, float]] = {}
        for place, (name, alpha) in enumerate((self._config.get("alpha_pattern") or {}).items()):
            self._patterns.setdefault(name.removeprefix("^"), (place, alpha))

    def scale(self, module: str, rank: int, alpha: TensorEntry | None) -> float:
        """For a layer of this rank."""
        if alpha is not None:
            return read_scalar(self._path, alpha) / rank
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        named = min((self._patterns[end] for end in ends if end in self._patterns), default=None)
        found = self._config.get("lora_alpha", rank) if named is None else named[1]
        return float(found / (math.sqrt(rank) if self._config.get("use_rslora") else rank))


def _peft_config(path: Path, metadata: Mapping[str, str], style: str) -> dict[str, Any]:
    """PEFT's config: in the header as diffusers writes it, or beside the file as PEFT does."""
    table = parse_object(metadata.get(_METADATA, "{}"), f"PEFT's config in {path}")
    config = {name.removeprefix("transformer."): value for name, value in table.items()}
    if style == "PEFT" and not config:
        beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
        if not beside.is_file():
            raise CheckpointError(
                f"{path} does not say how strong its layers are",
                expected=f"PEFT's {beside.name} beside it",
                found="none",
                remedy="Copy it from where the LoRA came from.",
            )
        config = read_object(beside)
    check_fields(config, _PEFT, f"PEFT's config of {path}")
    names = config.get("alpha_pattern") or {}
    regular = next((name for name in names if not _PLAIN_NAME.fullmatch(name)), None)
    if regular is not None:
        raise _damaged(path, "an alpha_pattern of module names", repr(regular))
    return config


def read_scalar(path: Path, entry: TensorEntry) -> float:
    """The one finite number in ``entry``.

    Raises:
        CheckpointError: it holds something else.
    """
    if math.prod(entry.shape) == 1 and entry.dtype == "BF16":
        value = struct.unpack("<f", b"\0\0" + read_bytes(entry))[0]
    elif math.prod(entry.shape) == 1 and entry.dtype in _SCALARS:
        value = float(struct.unpack(_SCALARS[entry.dtype], read_bytes(entry))[0])
    else:
        raise _damaged(path, f"{entry.name} as one number", f"{entry.dtype}{list(entry.shape)}")
    if not _ALPHA.fits(value):
        raise _damaged(path, f"{entry.name} as {_ALPHA.told}", str(value))
    return float(value)


def _family(layers: Mapping[str, LoraLayer]) -> str:
    blocks = [int(name.split(".")[1]) for name in layers if name.startswith("blocks.")]
    width = next((w for w in map(_width, layers.values()) if w), None)
    sizes = {dim: size for (dim, _, _), size in SIZES.items()}
    pictured = any("add_k_proj" in name or "image_embedder" in name for name in layers)
    size = "" if width is None else f" {sizes.get(width, 'of another size')} ({width} wide"
    count = "" if not blocks or width is None else f", {max(blocks) + 1} blocks"
    task = " I2V" if pictured else ""
    return f"Wan2.1{task}{size}{count}{')' if size else ''}"


def _width(layer: LoraLayer) -> int | None:
    """The hidden states' width, from a self-attention's layer."""
    entry = layer.down or layer.diff
    square = ".attn1.to_" in layer.module and entry is not None and len(entry.shape) == 2
    return entry.shape[1] if square and entry is not None else None


def _damaged(path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the LoRA {path} cannot be used",
        expected=expected,
        found=found,
        remedy="`penstock inspect` describes it; get the file again, or use another.",
    )


def _unknown(path: Path, names: Sequence[str], known: int) -> CheckpointError:
    kind = foreign_kind(names)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return CheckpointError(
        f"{path} cannot be applied to a Wan2.1 transformer",
        expected="low-rank pairs and differences of its layers, in the names of diffusers, PEFT, "
        "Kohya, ComfyUI or LightX2V",
        found=f"{len(names)} unknown keys beside {known} known layers: {shown}"
        + (f" ({kind})" if kind else ""),
        remedy="Use a LoRA that was made for Wan2.1.",
    )
