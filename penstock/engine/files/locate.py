"""From what a user has to the files of each component: a folder of diffusers or of Wan's own, a
ComfyUI root, a hub id, or single files. Only headers are read."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from penstock.engine.family.protocol import ComponentKind, Family, families
from penstock.engine.files import side_fields
from penstock.engine.files.experts import (
    FIRST,
    PARTS,
    SECOND,
    alone,
    check_order,
    expert_of,
    partner_of,
    pipeline_facts,
)
from penstock.engine.files.fields import Field, check_fields, parse_object, read_object
from penstock.engine.files.folders import SUFFIXES, comfy_folders, comfy_root, weight_files
from penstock.engine.files.hub import Fetch, hub_snapshot
from penstock.engine.files.incomplete import check_whole
from penstock.engine.files.keys import ComponentSource, find_naming, recognise
from penstock.engine.files.source import RawFile, dangling, open_raw, refusal_of
from penstock.errors import CheckpointError, NotRun, UsageError
from penstock.offload.checkpoint import PICKLES, TensorEntry
from penstock.offload.files import looked_at
from penstock.offload.shards import heads, is_shard
from penstock.regular import open_regular

log = logging.getLogger(__name__)

TOKENIZER_TENSOR = "spiece_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Files:
    """What was given besides, or instead of, a model: single files.

    Attributes:
        transformer, text_encoder, vae, image_encoder, audio_vae: a file, an index or a folder each;
            under a ComfyUI root a bare file name is enough.
        tokenizer: a tokenizer folder or a SentencePiece model.
        transformer_2: of a model of two transformers the one for little noise.
    """

    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None
    tokenizer: Path | None = None
    transformer_2: Path | None = None
    audio_vae: Path | None = None


INDEXES = ("model_index.json", "modular_model_index.json")
"""Of a pipeline's folder, and of a modular one's."""

COMPONENTS = ("transformer", "text_encoder", "vae", "image_encoder", "audio_vae")
"""Networks that a flag names, the one that streams first."""

_FLAGS = {name: "--" + name.replace("_", "-") for name in (*COMPONENTS, SECOND)}


@dataclass(frozen=True)
class ModelSource:
    """A whole model, wherever its parts lie.

    Attributes:
        origin: what it was found by, for people.
        parts: its networks by name, the one that streams first.
        tokenizer: a folder, a SentencePiece model, or the byte tensor that holds one.
        scheduler, image_processor: configs as diffusers and transformers write them.
        defaults: the model's own defaults for a request (``defaults.json``), often none.
        pipeline: of its ``model_index.json``, what determines how it is sampled; often nothing.
        lora_folders: where a LoRA that is given by its name is looked for.
        notes: what was passed over in finding it, for people.
    """

    origin: str
    parts: Mapping[str, ComponentSource]
    tokenizer: Path | TensorEntry
    scheduler: Mapping[str, Any]
    image_processor: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    lora_folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def streamed(self) -> ComponentSource:
        """The network whose blocks stream while latents are denoised."""
        return next(iter(self.parts.values()))

    @property
    def family(self) -> Family:
        """That the model is of."""
        return self.streamed.family

    def components(self) -> tuple[ComponentSource, ...]:
        """Return all that there are."""
        return tuple(self.parts.values())


def locate(model: str | Path | None, files: Files | None = None, *, fetch: Fetch | None = None
           ) -> ModelSource:  # fmt: skip
    """Find every part of a model and check that it is whole.

    Args:
        model: a folder, a file of a transformer, or a hub id; None: all parts are in ``files``.
        files: parts given by themselves; they win over what ``model`` holds.
        fetch: gets a snapshot from the hub; None: huggingface_hub does.

    Raises:
        UsageError: neither a model nor a transformer.
        CheckpointError: a part is missing, ambiguous, foreign or damaged.
    """
    files = files or Files()
    with looked_at(Path(model or files.transformer or ".")):
        return _locate(model, files, fetch or hub_snapshot)


def _locate(model: str | Path | None, files: Files, fetch: Fetch) -> ModelSource:
    if model is None:
        if files.transformer is None:
            raise UsageError(
                "no model was given", expected="--model, or --transformer with the other parts"
            )
        return _assemble(str(files.transformer), _Found(), files)
    path = Path(model).expanduser()
    if path.is_dir():
        return _assemble(str(path), _in_folder(path, files), files)
    if path.exists():
        return _assemble(str(path), _Found(), _with_transformer(path, files))
    if path.is_symlink():
        raise dangling(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _from_hub(model, files, fetch)
    raise CheckpointError(
        f"{model} does not exist",
        expected="a folder, a .safetensors or .gguf file, or a hub id such as "
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        remedy="Check the path.",
    )


def survey(folder: Path) -> dict[str, ComponentSource | CheckpointError]:
    """Return each part that the model in ``folder`` needs, or why it is not to be had there.

    Raises:
        CheckpointError: the folder holds no model at all.
    """
    found = _in_folder(folder, None)
    parts: dict[str, ComponentSource | CheckpointError] = {}
    try:
        parts |= _transformers(found, Files(), [])
    except CheckpointError as error:
        parts[FIRST] = error
    for name in COMPONENTS[1:]:
        try:
            parts[name] = _component(name, found, Files(), [])
        except CheckpointError as error:
            parts[name] = error
    first = parts[FIRST]
    if isinstance(first, ComponentSource):
        wanted = (FIRST, SECOND, *first.family.needed(first.config))
    else:
        others = [part.family for part in parts.values() if isinstance(part, ComponentSource)]
        wanted = tuple(name for family in others or families() for name in family.KINDS)
    return {name: part for name, part in parts.items() if name in wanted}


@dataclass(frozen=True)
class _Found:
    """Where the parts of a model may be: one place a component, or several to choose from; and the
    folders under which names count."""

    places: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    roots: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    lora_folders: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    scheduler: Mapping[str, Any] | None = None
    image_processor: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    pickles: tuple[Path, ...] = ()


def _with_transformer(path: Path, files: Files) -> Files:
    if files.transformer not in (None, path):
        raise UsageError(
            "the transformer was given twice",
            expected="one",
            found=f"--model {path} and --transformer",
        )
    return replace(files, transformer=path)


def _in_folder(folder: Path, files: Files | None) -> _Found:
    """Return the places of a model's parts; the folder of a pipeline must be whole, but for
    ``files``. None: it may lack parts."""
    for index in INDEXES:
        if (folder / index).exists():
            log.debug("%s is a folder of diffusers", folder)
            return _diffusers(folder, folder / index, files)
    root = comfy_root(folder)
    if root is not None:
        log.debug("%s is a folder of ComfyUI", root)
        return _comfy(folder, root)
    log.debug("%s is a repository of the model's makers, or any folder", folder)
    return _original(folder)


def _diffusers(folder: Path, path: Path, files: Files | None) -> _Found:
    index = _checked(path, side_fields.MODEL_INDEX) or {}
    check_pipeline(folder, index)
    if files is not None:
        given = {each.name for each in fields(files) if getattr(files, each.name) is not None}
        every = (*COMPONENTS, SECOND, "tokenizer")
        check_whole(path, index, [part for part in every if part not in given])
    parts = [name for name in (*COMPONENTS, SECOND) if (folder / name).is_dir()]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    processor = folder / "image_processor" / "preprocessor_config.json"
    seeing = folder / "processor" / "preprocessor_config.json"
    defaults = folder / "defaults.json"
    return _Found(
        places={name: (folder / name,) for name in parts},
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
        scheduler=_checked(scheduler, side_fields.SCHEDULER),
        image_processor=_checked(processor, side_fields.IMAGE_PROCESSOR)
        or _checked(seeing, side_fields.PROCESSOR),
        defaults=_checked(defaults, side_fields.DEFAULTS) or {},
        pipeline=pipeline_facts(index),
    )


def _checked(path: Path, table: Mapping[str, Field]) -> Mapping[str, Any] | None:
    """Return the config in ``path``, every value in its range; None if there is none."""
    if not path.exists():
        return None
    config = read_object(path)
    check_fields(config, table, str(path))
    return config


def check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a ``model_index.json`` of a pipeline that no family runs.

    Raises:
        CheckpointError: as the family that comes nearest says.
    """
    refused: CheckpointError | None = None
    for family in families():
        try:
            return family.check_pipeline(folder, index)
        except CheckpointError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _comfy(folder: Path, root: Path) -> _Found:
    roots = comfy_folders(folder, root)
    places = {
        name: tuple(path for place in roots[name] for path in weight_files(place))
        for name in COMPONENTS
    }
    return _Found(places=places, roots=roots, lora_folders=roots["loras"])


def _original(folder: Path) -> _Found:
    """Return Wan's own repository: a sharded transformer at the top, or two in folders of their
    own, and the rest beside it."""
    pair = {part: folder / f"{expert}_noise_model" for part, expert in PARTS.items()}
    places = {part: (place,) for part, place in pair.items() if place.is_dir()}
    index = sorted(folder.glob("*.safetensors.index.json"))
    loose = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SUFFIXES]
    if index:
        loose = [path for path in loose if not is_shard(path)]
        places[FIRST] = (index[0],)
    loose = heads(loose)
    for name in COMPONENTS:
        if name not in places or name == FIRST and index:
            places[name] = (*places.get(name, ()), *loose)
    pickles = tuple(p for p in sorted(folder.iterdir()) if p.suffix in PICKLES)
    if not (index or loose or pickles or places.get(SECOND)):
        raise CheckpointError(
            f"{folder} is not a model folder",
            expected="model_index.json (diffusers), models/diffusion_models (ComfyUI) or "
            "Wan's own files",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder",
            remedy="Check the path, or name the files one by one with --transformer and others.",
        )
    tokenizer = folder / "google" / "umt5-xxl"
    return _Found(
        places=places, tokenizer=tokenizer if tokenizer.is_dir() else None, pickles=pickles
    )


def _assemble(origin: str, found: _Found, files: Files) -> ModelSource:
    notes: list[str] = []
    streamed = _transformers(found, files, notes)
    first = streamed[FIRST]
    names = [name for name in first.family.needed(first.config) if name not in streamed]
    others = {name: _component(name, found, files, notes) for name in names}
    parts = {**streamed, **others}
    whole = {name: {**part.kind.defaults, **part.config} for name, part in parts.items()}
    first.family.check_together(origin, whole)
    return ModelSource(
        origin=origin,
        parts=parts,
        tokenizer=_tokenizer(parts["text_encoder"], found, files),
        scheduler=dict(found.scheduler or first.family.SCHEDULER),
        image_processor=_sized(found.image_processor or first.family.IMAGE_PROCESSOR),
        defaults=found.defaults,
        pipeline=found.pipeline,
        lora_folders=found.lora_folders,
        notes=tuple(dict.fromkeys(notes)),
    )


def _transformers(found: _Found, files: Files, notes: list[str]) -> dict[str, ComponentSource]:
    """Return the transformer, or the two of a model that has one for much noise and one for little.

    Raises:
        CheckpointError: one of two without the other.
        UsageError: they are not in their places.
    """
    chosen = _pair_among(found, files, notes)
    first = chosen[0] if chosen else _component(FIRST, found, files, notes)
    expert = expert_of(first.raw)
    second = chosen[1] if chosen else _second(first, found, files, notes)
    if second is not None:
        check_order(expert, expert_of(second.raw))
        return {FIRST: first, SECOND: _as_second(second)}
    has_two = SECOND in first.family.KINDS
    if has_two and (expert is not None or SECOND in first.family.needed(first.config)):
        raise alone(first.raw.path, expert or "high")
    return {FIRST: first}


def _second(
    first: ComponentSource, found: _Found, files: Files, notes: list[str]
) -> ComponentSource | None:
    """Return the transformer beside ``first``: as it was given, in its place, or the file beside it
    whose name says so; None: there is none."""
    if files.transformer_2 is not None or found.places.get(SECOND):
        return _component(SECOND, found, files, notes)
    partner = partner_of(first.raw.path)
    if partner is None or not partner.exists() or expert_of(first.raw) != "high":
        return None
    return _component(SECOND, found, replace(files, transformer_2=partner), notes)


def _pair_among(
    found: _Found, files: Files, notes: list[str]
) -> tuple[ComponentSource, ComponentSource] | None:
    """Return the only two transformers that there are, where their names say which is which."""
    places = found.places.get(FIRST, ())
    if files.transformer is not None or files.transformer_2 is not None or len(places) < 2:
        return None
    fits = _fitting(FIRST, places).found
    by_expert = {expert_of(each.raw): each for each in fits}
    if len(fits) != 2 or set(by_expert) != {"high", "low"}:
        return None
    return by_expert["high"], by_expert["low"]


def _as_second(source: ComponentSource) -> ComponentSource:
    return replace(source, kind=source.family.KINDS[SECOND])


def _sized(processor: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in processor.items()}


def _component(name: str, found: _Found, files: Files, notes: list[str]) -> ComponentSource:
    """Return the part ``name``; a second transformer is a transformer by itself."""
    given = getattr(files, name)
    if given is not None:
        return _given(name, given, found)
    places = found.places.get(name, ())
    if len(places) == 1 and places[0].is_dir():
        source = open_component(places[0])
        _check_kind(name, source)
        return source
    return _choose(name, places, found, notes)


def _given(name: str, given: Path, found: _Found) -> ComponentSource:
    given = given.expanduser()
    source = open_component(given if given.exists() else _named(name, given, found))
    _check_kind(name, source)
    return source


def _named(name: str, given: Path, found: _Found) -> Path:
    """Return the file of that name under a ComfyUI root, with or without its subfolder; else
    ``given``.

    Raises:
        CheckpointError: several subfolders hold one.
    """
    name = FIRST if name == SECOND else name
    whole = (root / given for root in found.roots.get(name, ()))
    direct = next((path for path in whole if path.is_file()), None)
    if direct is not None or given.is_absolute():
        return direct or given
    same = [
        path for path in found.places.get(name, ())
        if path.parts[-len(given.parts) :] == given.parts
    ]  # fmt: skip
    if len({path.resolve() for path in same}) > 1:
        raise CheckpointError(
            f"more than one file is called {given}",
            expected="one, or its subfolder with it",
            found=", ".join(map(str, same)),
        )
    return same[0] if same else given


def _check_kind(name: str, source: ComponentSource) -> None:
    if source.component != (FIRST if name == SECOND else name):
        raise CheckpointError(
            f"{source.raw.path} is not a {name.replace('_', ' ')}",
            expected=f"the {name.replace('_', ' ')} of a Wan2.1 model",
            found=f"a {source.kind.label} ({source.title})",
            remedy=f"Give it with {_FLAGS[source.component]}.",
        )
    source.check()


@dataclass(frozen=True)
class _Fits:
    """Of several files those that are one component, and why the others are not: they cannot be
    read at all, or they are something else."""

    found: list[ComponentSource]
    broken: list[CheckpointError]
    refused: list[CheckpointError]


def _fitting(name: str, places: tuple[Path, ...]) -> _Fits:
    fits = _Fits([], [], [])
    for path in places:
        try:
            raw = open_raw(path)
        except CheckpointError as error:
            fits.broken.append(error)
            continue
        try:
            source = recognise_beside(raw)
            if source.component == name:
                source.check()
                fits.found.append(source)
        except CheckpointError as error:
            log.debug("%s is not it: %s", path, error)
            fits.refused.append(error)
    return fits


def _choose(
    name: str, places: tuple[Path, ...], found: _Found, notes: list[str]
) -> ComponentSource:
    """Return the one file among ``places`` that is this component; others may be anything, and
    those that cannot be read at all are added to ``notes``."""
    fits = _fitting(name, places)
    if len(fits.found) == 1:
        notes += [f"passed over: {error}" for error in fits.broken]
        return fits.found[0]
    if fits.found:
        raise CheckpointError(
            f"more than one {name.replace('_', ' ')}",
            expected=f"one; name it with {_FLAGS[name]}",
            found=", ".join(_apart([source.raw.path for source in fits.found])),
        )
    raise _nothing(name, found, [*fits.broken, *fits.refused])


def _apart(paths: list[Path]) -> list[str]:
    """Return names that tell ``paths`` from each other."""
    names = [path.name for path in paths]
    return names if len({*names}) == len(names) else [str(path) for path in paths]


def _nothing(name: str, found: _Found, refused: list[CheckpointError]) -> CheckpointError:
    known = next((error for error in refused if isinstance(error, NotRun)), None)
    if known is not None:
        return known
    pickle = _likely_pickle(name, found.pickles)
    if pickle is not None:
        return refusal_of(pickle)
    if len(refused) == 1:
        return refused[0]
    if found.pickles:
        return refusal_of(found.pickles[0])
    return CheckpointError(
        f"the model has no {name.replace('_', ' ')}",
        expected=f"a file given with {_FLAGS[name]}, or a folder that holds one",
        found="none" if not refused else f"{len(refused)} files of other models",
        remedy="Comfy-Org's repackaged Wan 2.1 files have all parts.",
    )


def _likely_pickle(name: str, pickles: tuple[Path, ...]) -> Path | None:
    """Return the pickle that holds a part, by its name as Wan's makers give it."""
    marks = {"text_encoder": "t5", "vae": "vae", "image_encoder": "clip"}
    mark = marks.get(name)
    return next((path for path in pickles if mark and mark in path.name.lower()), None)


def open_component(path: Path) -> ComponentSource:
    """Recognise the component in ``path`` (a file, an index, or a folder with a config.json); mmgp
    writes the config into the file's header.

    Raises:
        CheckpointError: as `recognise` and `open_raw` do.
    """
    return recognise_beside(open_raw(path))


def recognise_beside(raw: RawFile) -> ComponentSource:
    """Recognise the component in ``raw``, with the config.json beside it where that is its own.

    Raises:
        CheckpointError: as `recognise` does.
    """
    with looked_at(raw.path):
        folder = raw.path if raw.path.is_dir() else raw.path.parent
        naming, config = find_naming(raw.entries), None
        if naming is not None:
            config = _config_beside(folder, naming.kind) or _config_within(raw, naming.kind)
        found = recognise(raw, config)
    if log.isEnabledFor(logging.DEBUG):
        told = (found.component, found.title, found.label())
        log.debug("%s (%s) is the %s of %s, stored as %s", raw.path, raw.kind, *told)
    return found


def _config_beside(folder: Path, kind: ComponentKind) -> dict[str, Any] | None:
    """Return the config.json in ``folder``, where it is that of a network of this kind."""
    path = folder / "config.json"
    if not path.exists():
        return None
    return _ours(read_object(path), kind)


def _config_within(raw: RawFile, kind: ComponentKind) -> dict[str, Any] | None:
    """Return the config that the header carries in base64, as mmgp saves it."""
    text = raw.metadata.get("config_base64")
    if not isinstance(text, str):
        return None
    where = f"config_base64 in the header of {raw.path}"
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CheckpointError(
            f"{where} cannot be used", expected="a JSON object", found=str(error)
        ) from error
    return _ours(parse_object(content, where), kind)


def _ours(config: Mapping[str, Any], kind: ComponentKind) -> dict[str, Any] | None:
    """Return ``config`` without what is not the network's own; None if it is not of this kind."""
    if config_owner(config) is not kind:
        return None
    foreign = "quantization_config"  # the tensors tell how they are stored
    return {k: v for k, v in config.items() if not k.startswith("_") and k != foreign}


def config_owner(config: Mapping[str, Any]) -> ComponentKind | None:
    """Return the network that a config.json of diffusers or transformers describes; None: a foreign
    one's, or one in a model's own style, which tells less than the shapes."""
    name, typed = config.get("_class_name"), config.get("model_type")
    kinds = [kind for family in families() for kind in family.KINDS.values()]
    for kind in kinds:
        if name in (kind.made_by[1], *kind.variants) or (
            name is None and typed is not None and typed == kind.model_type
        ):
            return kind
    return None


def _tokenizer(text: ComponentSource, found: _Found, files: Files) -> Path | TensorEntry:
    if files.tokenizer is not None:
        given = files.tokenizer.expanduser()
        if not given.exists():
            raise CheckpointError(f"{given} does not exist", expected="a tokenizer")
        if not given.is_dir():
            open_regular(given).close()
        return given
    if found.tokenizer is not None:
        return found.tokenizer
    embedded = text.extras.get(TOKENIZER_TENSOR)
    if embedded is not None:
        return embedded
    path = text.raw.path
    for folder in (path.parent, path.parent / "tokenizer"):
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            return folder
    raise CheckpointError(
        f"{path} comes without a tokenizer",
        expected=f"a {TOKENIZER_TENSOR} tensor in it, or tokenizer files beside it",
        found="neither",
        remedy="Give a folder with --tokenizer: google/umt5-xxl of the hub, or the tokenizer "
        "folder of any Wan2.1 -Diffusers repository; Comfy-Org's umt5_xxl files carry theirs.",
    )


def _from_hub(model: str, files: Files, fetch: Fetch) -> ModelSource:
    """From the local cache where it is whole, else downloaded (huggingface_hub resumes)."""
    there: CheckpointError | None = None
    try:
        folder = fetch(model, True)
        return _assemble(model, _in_folder(folder, files), files)
    except FileNotFoundError:
        pass  # not there
    except CheckpointError as error:
        there = error  # a download that did not finish: get what is missing
    try:
        folder = fetch(model, False)
    except (ConnectionError, FileNotFoundError) as error:
        where = "not" if there is None else "not whole"
        reason = "" if there is None else f"{there.what}: {there.found}. "
        raise CheckpointError(
            f"{model} is {where} in the local cache and cannot be downloaded",
            expected="a whole snapshot, or a way to the hub",
            found=reason + str(error).strip().partition("\n")[0] or type(error).__name__,
            remedy="Go online, or give a folder or files that you have.",
        ) from error
    return _assemble(model, _in_folder(folder, files), files)
