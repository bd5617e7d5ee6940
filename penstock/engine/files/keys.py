"""What a file of weights is, by its keys and header: component, naming, config, storage, and what
is missing or unknown. Only headers are read, and ComfyUI's short descriptions of layers."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from penstock.engine.family.naming import PREFIXES, THREE, Naming, ShapesOf
from penstock.engine.family.protocol import ComponentKind, Family, families
from penstock.engine.files.fields import parse_object
from penstock.engine.files.source import RawFile, read_bytes
from penstock.engine.files.storage import COMFY_MARK, PACK_METADATA, StoredWeight, as_bytes, gather
from penstock.errors import CheckpointError, NotRun, TensorMismatch
from penstock.formats.gguf import BLOCK_SIZES
from penstock.formats.gguf import PREFIX as GGUF
from penstock.formats.micro import TILE_ROWS, Micro
from penstock.formats.recognise import WHOLE, split_suffix
from penstock.offload.checkpoint import TensorEntry

log = logging.getLogger(__name__)

_EMBED_TOKENS = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class ComponentSource:
    """One network of a model as a file holds it, under diffusers' names.

    Attributes:
        family: of the model.
        kind: which network of that family.
        naming: whose names the file uses.
        config: of the component, given or derived from shapes.
        weights: how and where each parameter is stored, in the model's order.
        extras: tensors beside the model's own, such as the tokenizer (``spiece_model``).
        missing, unknown, misshaped: what keeps the file from being used; all empty if it can be.
    """

    family: Family
    kind: ComponentKind
    naming: str
    raw: RawFile
    config: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]
    extras: Mapping[str, TensorEntry]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshaped: tuple[str, ...]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor that the config demands."""
        return MappingProxyType(self.kind.shapes(self.config))

    @property
    def component(self) -> str:
        """Its name: "transformer", "vae", ..."""
        return self.kind.name

    @property
    def title(self) -> str:
        """The model's name for people: "Wan2.1 I2V 14B", or its component's."""
        return self.kind.title(self.config)

    @property
    def parameters(self) -> int:
        """Weights of the whole component."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of the component."""
        return sum(weight.nbytes for weight in self.weights.values())

    def entries(self) -> dict[str, TensorEntry]:
        """Return the places of all stored tensors: ``module.weight``, ``module.weight_scale``, ...

        Blocks of GGUF are rows of bytes ("U8"), as the formats take them.
        """
        return {
            stored_name(name, suffix): as_bytes(entry)
            for name, weight in self.weights.items()
            for suffix, entry in weight.tensors.items()
        }

    def label(self) -> str:
        """Return the storage of most parameters."""
        counts: Counter[str] = Counter()
        for name, shape in self.shapes.items():
            if name in self.weights:
                counts[self.weights[name].label] += math.prod(shape)
        return counts.most_common(1)[0][0] if counts else "empty"

    def check(self) -> None:
        """Refuse a file that is not exactly this component.

        Raises:
            TensorMismatch: names the first missing, unknown or misshaped tensor and their count.
        """
        for what, names in (("unknown", self.unknown), ("missing", self.missing)):
            if names:
                raise TensorMismatch(
                    f"{self.raw.path} is not a whole {self.kind.label}",
                    expected=f"the {len(self.shapes)} tensors of {self.title}",
                    found=f"{len(names)} {what}, the first is {names[0]}",
                    remedy="The file is incomplete or belongs to another model; "
                    "`penstock inspect` lists what it holds.",
                )
        if self.misshaped:
            self._refuse_shape(self.misshaped[0])

    def _refuse_shape(self, name: str) -> None:
        found = self.weights[name].shape
        raise TensorMismatch(
            f"{self.raw.path} does not hold the shapes its config demands "
            f"({len(self.misshaped)} misshaped)",
            expected=f"{name} of shape {list(self.shapes[name])}",
            found="another number of bytes" if found is None else str(list(found)),
            remedy="Weights and config.json belong to different models: copy both again.",
        )


def stored_name(name: str, suffix: str) -> str:
    """Return the full name of a stored tensor of the parameter ``name``."""
    return name if suffix == "weight" else name.removesuffix("weight") + suffix


@dataclass(frozen=True)
class Recognised:
    """Which network the keys of a file are those of.

    Attributes:
        prefix: what stands before every name.
    """

    family: Family
    kind: ComponentKind
    naming: Naming
    prefix: str


def find_naming(keys: Iterable[str]) -> Recognised | None:
    """Find the naming whose marks ``keys`` bear, the one with the most; None if there is none."""
    names = tuple(keys)
    known = [
        (family, kind, naming)
        for family in families()
        for kind in family.KINDS.values()
        for naming in kind.namings
    ]
    for prefix in PREFIXES:
        local = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        borne = [
            Recognised(family, kind, naming, prefix)
            for family, kind, naming in known
            if all(any(name.startswith(mark) for name in local) for mark in naming.marks)
        ]
        if borne:
            return max(borne, key=lambda found: len(found.naming.marks))
    return None


def recognise(raw: RawFile, config: Mapping[str, Any] | None = None) -> ComponentSource:
    """Say what ``raw`` is.

    Args:
        config: of the component, where a config.json is known; else it is derived from shapes.

    Raises:
        CheckpointError: no component of a model that is run, or stored in an unknown way.
        TensorMismatch: a tensor that tells a dimension is missing.
    """
    _refuse_strangers(raw)
    found = find_naming(raw.entries)
    if found is None:
        raise _foreign(raw)
    log.debug("%s: keys of %s, after %r", raw.path, found.naming.author, found.prefix)
    named = _rename(raw, found)
    weights = gather(named.entries, raw.metadata, read_bytes, found.prefix)
    _check_parts(weights)
    shapes = {name: stored.shape for name, stored in weights.items() if stored.shape is not None}
    if config is None:
        config = _derived(raw, found, weights, shapes)
    config = {**config, **found.naming.config}
    found.kind.check(str(raw.path), config)
    return _compare(raw, found, config, weights, named)


def _derived(
    raw: RawFile,
    found: Recognised,
    weights: Mapping[str, StoredWeight],
    shapes: Mapping[str, tuple[int, ...]],
) -> Mapping[str, Any]:
    """Return the config that shapes tell.

    Raises:
        TensorMismatch: they do not.
    """
    try:
        return found.kind.derive(ShapesOf(str(raw.path), shapes))
    except TensorMismatch as error:
        silent = [name for name, stored in weights.items() if stored.shape is None]
        if not silent:
            raise
        raise TensorMismatch(
            f"{raw.path} does not determine its shapes",
            expected="the model's config.json beside it",
            found=f"{silent[0]} in {weights[silent[0]].label}, whose groups do not determine them",
            remedy="Put the file into a folder with the config.json of the same model.",
        ) from error


@dataclass(frozen=True)
class _Named:
    entries: dict[str, TensorEntry]
    extras: dict[str, TensorEntry]
    unknown: list[str]


def _rename(raw: RawFile, found: Recognised) -> _Named:
    naming, prefix = found.naming, found.prefix
    named = _Named({}, {}, [])
    for key, entry in raw.entries.items():
        local = key.removeprefix(prefix)
        if local == COMFY_MARK or key == COMFY_MARK:
            named.entries[COMFY_MARK] = entry
        elif local.startswith(naming.ignored):
            named.extras[local] = entry
        elif not key.startswith("__"):  # padding and checksums of packs
            _place(named, key, naming.rename(local), entry)
    if found.kind.name == "text_encoder":
        _untie(named.entries)
    if found.kind.name == "transformer":
        _unfold(named.entries)
    for name, kind in packed_facts(raw).get("gguf", {}).items():
        if name in named.entries:
            named.entries[name] = _as_blocks(named.entries[name], kind)
    return named


def packed_facts(raw: RawFile) -> dict[str, Any]:
    """Return what a pack says of itself: ``compute`` (the dtype's tag) and ``gguf`` (ggml type of
    each parameter that it stores as GGUF blocks) among others; nothing for other files.

    Raises:
        CheckpointError: the pack's metadata are damaged.
    """
    if PACK_METADATA not in raw.metadata:
        return {}
    try:
        facts = parse_object(str(raw.metadata[PACK_METADATA]), str(raw.path))
        return facts | {"gguf": {str(n): str(kind) for n, kind in facts["gguf"].items()}}
    except (KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{raw.path} has damaged metadata", expected="those of a pack", found=str(error)
        ) from error


def _as_blocks(entry: TensorEntry, kind: str) -> TensorEntry:
    """Return the rows of bytes as the GGUF blocks they are."""
    block, nbytes = BLOCK_SIZES.get(GGUF + kind, (0, 0))
    if not block or entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] % nbytes:
        raise CheckpointError(
            f"{entry.name} cannot be read", expected=f"blocks of {kind}", found=str(entry.shape)
        )
    shape = (entry.shape[0], entry.shape[1] // nbytes * block)
    return replace(entry, dtype=GGUF + kind, shape=shape)


def _place(named: _Named, key: str, target: str | None, entry: TensorEntry) -> None:
    if target is None:
        named.unknown.append(key)
        return
    for name, part in _parts(target, entry):
        if name in named.entries:
            raise CheckpointError(
                f"{entry.file} holds one tensor twice, under two names",
                expected=f"one {name}",
                found=f"{named.entries[name].name} and {key}",
            )
        named.entries[name] = part


def _parts(target: str, entry: TensorEntry) -> list[tuple[str, TensorEntry]]:
    """Return ``target`` with its place, or three names with a third of the rows each."""
    if THREE in target:
        split = split_suffix(target)
        serves_all = split is not None and split[1] in WHOLE
        return [
            (target.replace(THREE, name), entry if serves_all else row_part(entry, index, 3))
            for index, name in enumerate("qkv")
        ]
    if target.startswith("embeddings.") and entry.shape[:-1] and entry.shape[0] == 1:
        return [(target, replace(entry, shape=_squeezed(target, entry.shape)))]
    return [(target, entry)]


def _squeezed(target: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions without those of the batch that open_clip gives its embeddings."""
    keep = 1 if target.endswith("class_embedding") else 2
    extra = len(shape) - keep
    return shape[extra:] if extra > 0 and set(shape[:extra]) == {1} else shape


def row_part(entry: TensorEntry, index: int, count: int) -> TensorEntry:
    """Return part ``index`` of ``count`` equal runs of rows, without a copy; a scalar serves all
    parts."""
    if not entry.shape or entry.shape[0] % count:
        return entry
    nbytes = entry.nbytes // count
    return replace(
        entry,
        offset=entry.offset + index * nbytes,
        shape=(entry.shape[0] // count, *entry.shape[1:]),
        nbytes=nbytes,
    )


def _check_parts(weights: Mapping[str, StoredWeight]) -> None:
    """Refuse three matrices in one whose scales cannot be told apart.

    Raises:
        CheckpointError: scales in tiles of rows, of which one belongs to two of the matrices.
    """
    counts = Counter(w.tensors["weight"].name for w in weights.values() if "weight" in w.tensors)
    for name, stored in weights.items():
        shape = stored.shape
        if not isinstance(stored.format, Micro) or shape is None or not shape[0] % TILE_ROWS:
            continue
        if counts[stored.tensors["weight"].name] > 1:
            raise CheckpointError(
                f"{stored.tensors['weight'].name} cannot be taken apart",
                expected=f"matrices of whole tiles, each of {TILE_ROWS} rows",
                found=f"{name} with {shape[0]} rows",
                remedy="Use a file in another format.",
            )


def _unfold(entries: dict[str, TensorEntry]) -> None:
    """Give the patch embedding five dimensions: tools whose tensors have four (ggml's) leave out
    the one of time, or lay outputs and inputs into one. The bytes are the same."""
    entry, bias = (entries.get(f"patch_embedding.{end}") for end in ("weight", "bias"))
    if entry is None or bias is None or len(entry.shape) != 4 or len(bias.shape) != 1:
        return
    rows, (height, width) = bias.shape[0], entry.shape[2:]
    inputs, left = divmod(math.prod(entry.shape), max(1, rows * height * width))
    if not left:
        shape = (rows, inputs, 1, height, width)
        entries["patch_embedding.weight"] = replace(entry, shape=shape)


def _untie(entries: dict[str, TensorEntry]) -> None:
    """Leave one of the embedding's two names in UMT5 files, of which one or both are written."""
    tied = [key for key in entries if key.startswith("encoder.embed_tokens.")]
    for key in tied:
        entry = entries.pop(key)
        entries.setdefault(key.replace("encoder.embed_tokens.", "shared."), entry)


def _compare(
    raw: RawFile,
    found: Recognised,
    config: Mapping[str, Any],
    weights: Mapping[str, StoredWeight],
    named: _Named,
) -> ComponentSource:
    try:
        expected = found.kind.shapes(config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the config.json of {raw.path} cannot be used",
            expected=f"the entries of a {found.kind.name} config",
            found=f"{type(error).__name__} {error}",
        ) from error
    known = {name: weights[name] for name in expected if name in weights}
    strangers = [w.tensors for name, w in weights.items() if name not in expected]
    return ComponentSource(
        family=found.family,
        kind=found.kind,
        naming=found.naming.author,
        raw=raw,
        config=config,
        weights=known,
        extras=named.extras,
        missing=tuple(name for name in expected if name not in weights),
        unknown=_sorted([*named.unknown, *(e.name for t in strangers for e in t.values())]),
        misshaped=tuple(name for name, w in known.items() if not w.holds(expected[name])),
    )


def _sorted(names: list[str]) -> tuple[str, ...]:
    """Return the numbers in names by value."""
    return tuple(
        sorted(
            names,
            key=lambda name: [
                (int(part), "") if part.isdigit() else (0, part)
                for part in re.split(r"(\d+)", name)
            ],
        )
    )


def _refuse_strangers(raw: RawFile) -> None:
    """Call a model by its name that is like those of a family and is not run.

    Raises:
        NotRun: it is one.
    """
    for family in families():
        name = family.stranger(raw.entries)
        if name is not None:
            raise not_run(str(raw.path), name)


def not_run(where: str, name: str) -> NotRun:
    """Return the refusal of a model that is known by ``name``."""
    return NotRun(
        f"{where} is of {name}",
        expected="a model that penstock runs: `penstock plan --synthetic` names them",
        found=name,
        remedy=f"penstock does not run {name}: use a model that it runs.",
    )


def _foreign(raw: RawFile) -> CheckpointError:
    names = list(raw.entries)
    lora = any(".lora_" in name or name.endswith((".diff", ".diff_b")) for name in names)
    return CheckpointError(
        f"{raw.path} is {'a LoRA' if lora else 'no component of a Wan2.1 model'}",
        expected="a Wan2.1 transformer, VAE, UMT5 or CLIP ViT in a known naming",
        found=f"{len(names)} unknown tensors, the first is {names[0]}" if names else "no tensors",
        remedy="Give it with --lora, beside the base model."
        if lora
        else "Check that this is the right file.",
    )
