"""LoRA files: opened by their headers, checked against the model, and nothing read but alphas.

Free of torch, so that a file can be described without it. What is added to the model's weights is
`penstock.engine.lora.place`'s (beside them) and `penstock.engine.lora.merge`'s (into a pack).
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from penstock.engine.family.naming import THREE
from penstock.engine.family.protocol import families
from penstock.engine.files.experts import expert_of_folder, expert_of_lora
from penstock.engine.files.fields import (
    Field,
    check_fields,
    flag,
    maybe,
    number,
    parse_object,
    read_object,
)
from penstock.engine.files.keys import ComponentSource, row_part
from penstock.engine.files.source import dangling, read_bytes
from penstock.engine.lora.keys import KeyPart, Said, foreign_kind, is_lora, parse_key
from penstock.engine.lora.layer import Incomplete, LoraLayer, WeightChange, changes_of, fit
from penstock.errors import CheckpointError, TensorMismatch, UsageError, brief
from penstock.formats.patch import MAGNITUDE
from penstock.offload.checkpoint import Checkpoint, TensorEntry
from penstock.offload.files import FileStamp, looked_at

_LARGEST = 1e300
EXPERTS = ("high", "low", "both")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SHOWN = 3
_MOST_DIMENSIONS = 5
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
        strict: refuse it if one of its tensors has no place in the model, instead of leaving that
            one out.
        expert: of a model of two transformers the one that it is for, "high" or "low" (noise), or
            "both"; None: the one that its name says, else both.

    Raises:
        UsageError: the strength is not a finite number, or there is no such expert.
    """

    path: Path
    strength: float = 1.0
    strict: bool = False
    expert: str | None = None

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
        if self.expert not in (None, *EXPERTS):
            raise UsageError(
                f"{self.path} names an unknown transformer",
                expected=" or ".join(EXPERTS),
                found=brief(self.expert),
            )

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Make it from ``FILE``, ``FILE:STRENGTH``, and either with ``@high``, ``@low`` or
        ``@both`` behind it; a colon that no number follows is the path's, and so is another ``@``.

        Raises:
            UsageError: as the class.
        """
        whole, at, expert = text.rpartition("@")
        named = bool(at and whole) and expert in EXPERTS
        text, wanted = (whole, expert) if named else (text, None)
        path, colon, tail = text.rpartition(":")
        try:
            if colon and path:
                return cls(Path(path), float(tail), expert=wanted)
        except ValueError:
            pass
        return cls(Path(text), expert=wanted)

    def is_for(self, expert: str) -> bool:
        """Return whether it changes that one of two transformers."""
        own = self.expert or expert_of_lora(self.path.name) or expert_of_folder(self.path)
        return own in (None, "both", expert)


def as_loras(given: Sequence[Lora | str | Path], *, strict: bool = False) -> tuple[Lora, ...]:
    """Return what was given as `Lora`s: a text is read as `Lora.parse` does, a path has strength 1.

    Args:
        strict: none of them may have tensors without a place.
    """
    found = (
        Lora.parse(each)
        if isinstance(each, str)
        else Lora(each)
        if isinstance(each, Path)
        else each
        for each in given
    )
    return tuple(replace(lora, strict=True) if strict else lora for lora in found)


@dataclass(frozen=True)
class LeftOut:
    """Tensors of a LoRA that are not applied, and why."""

    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as its header describes it.

    Attributes:
        path: as it was given.
        styles: whose key names, the most frequent first.
        layers: by module.
        unknown: keys of which nothing is known.
        strays: tensors that are known, and that nothing can be done with.
        tensors: how many there are in the file.
        stamps: the file as it was when its header was read.
    """

    path: Path
    styles: tuple[str, ...]
    layers: Mapping[str, LoraLayer]
    unknown: tuple[str, ...]
    strays: tuple[LeftOut, ...]
    tensors: int
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
    def kinds(self) -> Counter[str]:
        """Number of changed weights by kind: lora, loha, lokr, ..., or "dora"."""
        changes = (change for layer in self.layers.values() for change in layer.weights)
        return Counter("dora" if MAGNITUDE in change.entries else change.kind for change in changes)

    @property
    def family(self) -> str:
        """The model it was made for, as far as its tensors tell."""
        return _family(self.layers)

    def fitted(self, source: ComponentSource, *, strict: bool) -> FittedLora:
        """Return what of it is applied to the transformer ``source``.

        Raises:
            CheckpointError, TensorMismatch: nothing is; ``strict``: not all is.
        """
        if strict:
            self.check(source)
        turned, odd = _turned(self.layers.values(), source)
        layers, wrong = fit(turned, source.shapes)
        if not layers:
            self.check(source)
        left = [LeftOut((name,), foreign_kind([name]) or "unknown") for name in self.unknown]
        left += [LeftOut(miss.names, miss.why) for miss in wrong]
        return FittedLora(
            self, {layer.module: layer for layer in layers}, (*left, *odd, *self.strays)
        )

    def check(self, source: ComponentSource) -> None:
        """Refuse what cannot be applied as a whole to the transformer ``source``.

        Raises:
            CheckpointError: unknown keys, named, with their count.
            TensorMismatch: tensors that do not fit; says whether it was made for another model.
        """
        self.check_keys()
        _, wrong = fit(self.layers.values(), source.shapes)
        if wrong:
            first = wrong[0]
            raise TensorMismatch(
                _whose(self, source)
                + f": {sum(len(miss.names) for miss in wrong)} tensors do not fit",
                expected=first.expected,
                found=first.found,
                remedy="Use a LoRA that was made for this model.",
            )

    def check_keys(self) -> None:
        """Refuse a file that is not wholly understood.

        Raises:
            CheckpointError: names the first unknown key and their count.
        """
        names = (*self.unknown, *(name for stray in self.strays for name in stray.names))
        if names or not self.layers:
            raise _unknown(self.path, names, len(self.layers))


@dataclass(frozen=True)
class FittedLora:
    """A LoRA file beside the model it is applied to.

    Attributes:
        layers: what is applied, by module.
        left_out: what is not.
    """

    file: LoraFile
    layers: Mapping[str, LoraLayer]
    left_out: tuple[LeftOut, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are applied."""
        return sum(e.nbytes for layer in self.layers.values() for e in layer.entries())

    @property
    def notice(self) -> str | None:
        """What is to be said of what is left out; None if nothing is."""
        if not self.left_out:
            return None
        names = [(name, miss.why) for miss in self.left_out for name in miss.names]
        shown = ", ".join(f"{name} ({why})" for name, why in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        verb = "is" if len(names) == 1 else "are"
        return (
            f"{self.file.path.name}: {len(names)} of {self.file.tensors} tensors {verb} left out: "
            f"{shown}{more}; the others are applied (--lora-strict refuses such a file)"
        )


def _turned(
    layers: Iterable[LoraLayer], source: ComponentSource
) -> tuple[list[LoraLayer], list[LeftOut]]:
    """Return the layers with a mark on those whose halves the model has the other way round; and
    what cannot be turned."""
    config = {**source.kind.defaults, **source.config}
    found: list[LoraLayer] = []
    left: list[LeftOut] = []
    for layer in layers:
        other = any(config.get(name) != value for name, value in layer.said)
        if other and not all(
            change.kind == "lora" and MAGNITUDE not in change.entries for change in layer.weights
        ):
            names = tuple(entry.name for entry in layer.entries())
            left.append(LeftOut(names, "its halves are in another order than the model's"))
        else:
            found.append(replace(layer, turned=other))
    return found, left


def _whose(file: LoraFile, source: ComponentSource) -> str:
    """Return what the file is for, where that is another model; else that some of it does not
    fit."""
    width, blocks, pictured = _traits(file.layers)
    inner = source.config["num_attention_heads"] * source.config["attention_head_dim"]
    other = width not in (None, inner) or blocks > source.config["num_layers"]
    if other or (pictured and source.config.get("image_dim") is None):
        return f"{file.path} is a LoRA for {file.family}, and this model is {source.title}"
    return f"{file.path} is not wholly for this model, {source.title}"


def open_lora(path: Path) -> LoraFile:
    """Read the header of a LoRA file, and its alphas.

    Raises:
        PickleRefused, HeaderError: as for any checkpoint.
        CheckpointError: no LoRA, or a damaged one: half a pair, ranks that differ, integers.
    """
    path = path.expanduser()
    with looked_at(path):
        if path.is_symlink() and not path.exists():
            raise dangling(path)
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist", expected="a LoRA's .safetensors", remedy="Check the path."
            )
    with Checkpoint.open(path) as found:
        entries, metadata, stamps = dict(found), dict(found.metadata), dict(found.files)
    if not is_lora(entries):
        raise CheckpointError(
            f"{path} is not a LoRA",
            expected="tensors such as ...lora_A.weight, ...lora_down.weight or ...diff",
            found=next(iter(entries), "no tensors"),
            remedy="A model's own file goes to --model or --transformer.",
        )
    grouped, said, styles, unknown = _group(path, entries)
    alphas = _Alphas(path, metadata, styles, grouped.values())
    layers: dict[str, LoraLayer] = {}
    strays: list[LeftOut] = []
    for module, parts in grouped.items():
        layer, left = _layer(path, module, parts, alphas)
        strays += left
        if layer.weights or layer.bias is not None:
            layers[module] = replace(layer, said=said[module])
    alphas.check_magnitudes(layers.values())
    order = tuple(style for style, _ in styles.most_common())
    return LoraFile(path, order, layers, tuple(unknown), tuple(strays), len(entries), stamps)


_Parts = dict[str, TensorEntry]


def _group(
    path: Path, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, _Parts], dict[str, Said], Counter[str], list[str]]:
    grouped: dict[str, _Parts] = {}
    said: dict[str, Said] = {}
    styles: Counter[str] = Counter()
    unknown: list[str] = []
    told: dict[str, KeyPart | None] = {key: parse_key(key) for key in entries}
    owners = Counter(part.family for part in told.values() if part is not None)
    family = owners.most_common(1)[0][0] if owners else ""
    for key, entry in entries.items():
        part = told[key]
        if part is None or part.family != family:
            unknown.append(key)
            continue
        role = "diff" if part.role == "diff_m" else part.role
        shared = _shared(part.module, role, entry)
        if shared is None:
            unknown.append(key)
            continue
        for module, own in shared:
            parts = grouped.setdefault(module, {})
            if role in parts:
                raise _damaged(path, f"one {role} of {module}", f"{parts[role].name} and {key}")
            parts[role], said[module] = own, part.said
        styles[part.style] += 1
    return grouped, said, styles, unknown


def _shared(module: str, role: str, entry: TensorEntry) -> list[tuple[str, TensorEntry]] | None:
    """Return ``entry`` for its module; where that stands for three (`THREE`), each one's own rows
    of what has a row an output, and the whole of what has none. None: it cannot be shared out."""
    if THREE not in module:
        return [(module, entry)]
    by_rows = role in ("up", "diff", "diff_b", "up_bias")
    if not (by_rows or role in ("down", "alpha")) or (by_rows and entry.shape[0] % 3):
        return None
    return [
        (module.replace(THREE, name), row_part(entry, index, 3) if by_rows else entry)
        for index, name in enumerate("qkv")
    ]


def _layer(
    path: Path, module: str, parts: _Parts, alphas: _Alphas
) -> tuple[LoraLayer, list[LeftOut]]:
    """Return what the file does to ``module``, and those of its tensors that do nothing."""
    for role, entry in parts.items():
        if role not in ("alpha", "reshape") and entry.dtype not in FLOATS:
            raise _damaged(path, f"{entry.name} in {', '.join(FLOATS)}", entry.dtype)
    if {"diff_b", "up_bias"} <= parts.keys():
        raise _damaged(path, f"one change of the bias of {module}", "two")
    if "tucker" in parts:
        names = tuple(entry.name for entry in parts.values())
        return LoraLayer(module), [LeftOut(names, "a convolution's Tucker form")]
    found = changes_of(module, parts)
    if isinstance(found, Incomplete):
        raise _damaged(path, found.expected, found.found)
    reshape = _reshape(path, parts.get("reshape"))
    weights = tuple(
        replace(change, scale=alphas.scale(module, change, parts.get("alpha")),
                reshape=reshape if change.kind == "lora" else None)
        for change in found
    )  # fmt: skip
    low_rank = any(change.kind not in ("diff", "set") for change in weights)
    layer = LoraLayer(
        module=module,
        weights=weights,
        bias=parts.get("diff_b", parts.get("up_bias") if low_rank else None),
        bias_scale=1.0 if "diff_b" in parts else next((c.scale for c in weights), 1.0),
    )
    used = {entry.name for entry in layer.entries()}
    idle = {"alpha": not low_rank, "reshape": reshape is None or not low_rank}
    left = [
        LeftOut((entry.name,), f"nothing that it belongs to in {module}")
        for role, entry in parts.items()
        if entry.name not in used and idle.get(role, True)
    ]
    return layer, left


def _reshape(path: Path, entry: TensorEntry | None) -> tuple[int, ...] | None:
    """Return the dimensions that a ``reshape_weight`` names."""
    if entry is None:
        return None
    form = {"I64": "q", "I32": "i"}.get(entry.dtype)
    if form is None or len(entry.shape) != 1 or not 2 <= entry.shape[0] <= _MOST_DIMENSIONS:
        found = f"{entry.dtype}{list(entry.shape)}"
        raise _damaged(path, f"{entry.name} as a weight's dimensions", found)
    return struct.unpack(f"<{entry.shape[0]}{form}", read_bytes(entry))


class _Alphas:
    """alpha / rank of each layer: from the file's tensors, else from what PEFT says of it."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        styles: Counter[str],
        modules: Collection[_Parts],
    ) -> None:
        self._path = path
        pairs = [parts for parts in modules if "down" in parts]
        silent = not any("alpha" in parts for parts in pairs)
        style = styles.most_common(1)[0][0] if styles and silent else ""
        self._config = _peft_config(path, metadata, style)
        # By the end of a module's name that each holds of, with its place: the first one counts
        self._patterns: dict[str, tuple[int, float]] = {}
        for place, (name, alpha) in enumerate((self._config.get("alpha_pattern") or {}).items()):
            self._patterns.setdefault(name.removeprefix("^"), (place, alpha))

    def check_magnitudes(self, layers: Collection[LoraLayer]) -> None:
        """Refuse a DoRA whose magnitudes are not there.

        Raises:
            CheckpointError: PEFT's config says that it is one, and no layer has any.
        """
        changes = (change for layer in layers for change in layer.weights)
        if self._config.get("use_dora") and not any(MAGNITUDE in c.entries for c in changes):
            raise _unknown(self._path, ("use_dora",), 0)

    def scale(self, module: str, change: WeightChange, alpha: TensorEntry | None) -> float:
        """For what is done to one weight."""
        if change.kind in ("oft", "boft"):
            return 0.0 if alpha is None else read_scalar(self._path, alpha)
        if not change.rank:
            return 1.0
        if alpha is not None:
            return read_scalar(self._path, alpha) / change.rank
        if change.kind != "lora":
            return 1.0
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        named = min((self._patterns[end] for end in ends if end in self._patterns), default=None)
        found = self._config.get("lora_alpha", change.rank) if named is None else named[1]
        rank = math.sqrt(change.rank) if self._config.get("use_rslora") else change.rank
        return float(found / rank)


def _peft_config(path: Path, metadata: Mapping[str, str], style: str) -> dict[str, Any]:
    """Return PEFT's config: in the header as diffusers writes it, or beside the file as PEFT
    does."""
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
    """Read the one finite number in ``entry``.

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
    return families()[0].adapted_title(*_traits(layers))


def _traits(layers: Mapping[str, LoraLayer]) -> tuple[int | None, int, bool]:
    """Return the width and blocks of the model that a file was made for, and whether it takes
    pictures; as far as the file tells."""
    blocks = [int(name.split(".")[1]) for name in layers if name.startswith("blocks.")]
    width = next((w for w in map(_width, layers.values()) if w), None)
    pictured = any("add_k_proj" in name or "image_embedder" in name for name in layers)
    return width, max(blocks, default=-1) + 1, pictured


def _width(layer: LoraLayer) -> int | None:
    """Return the hidden states' width, from a self-attention's layer."""
    entries = (
        c.entries.get(role) for c in layer.weights for role in ("down", "diff", "w1_b", "a2")
    )
    entry = next((e for e in entries if e is not None and len(e.shape) == 2), None)
    told = ".attn1.to_" in layer.module and not any(c.kind == "lokr" for c in layer.weights)
    return entry.shape[1] if told and entry is not None else None


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
        expected="LoRA, LoHa, LoKr, DoRA, GLoRA, OFT or differences of its layers, in the names "
        "of diffusers, PEFT, Kohya, LyCORIS, ComfyUI, DiffSynth or LightX2V",
        found=f"{len(names)} unknown keys beside {known} known layers: {shown}"
        + (f" ({kind})" if kind else ""),
        remedy="Use a LoRA that was made for Wan2.1.",
    )
