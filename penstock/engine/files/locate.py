"""From what a user has to the files of each component: a folder of diffusers or of Wan's own, a
ComfyUI root, a hub id, or single files. Only headers are read."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.family.protocol import Family, families
from penstock.engine.files import side_fields as fields
from penstock.engine.files.fields import Field, check_fields, parse_object, read_object
from penstock.engine.files.hub import Fetch, hub_snapshot
from penstock.engine.files.keys import ComponentSource, recognise
from penstock.engine.files.source import RawFile, open_raw, refusal_of
from penstock.errors import CheckpointError, PenstockError, UsageError
from penstock.offload.checkpoint import PICKLES, TensorEntry
from penstock.offload.files import looked_at
from penstock.regular import open_regular, read_regular

log = logging.getLogger(__name__)

TOKENIZER_TENSOR = "spiece_model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_COMFY_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    "image_encoder": ("clip_vision",),
}
_SHOWN = 200
_MAX_YAML_BYTES = 256 << 10
_SUFFIXES = (".safetensors", ".gguf")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Files:
    """What was given besides, or instead of, a model: single files.

    Attributes:
        transformer, text_encoder, vae, image_encoder: a file, an index or a folder each; under a
            ComfyUI root a bare file name is enough.
        tokenizer: a tokenizer folder or a SentencePiece model.
    """

    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None
    tokenizer: Path | None = None


COMPONENTS = ("transformer", "text_encoder", "vae", "image_encoder")
"""Networks that a flag names, the one that streams first."""

_FLAGS = {name: "--" + name.replace("_", "-") for name in COMPONENTS}


@dataclass(frozen=True)
class ModelSource:
    """A whole model, wherever its parts lie.

    Attributes:
        origin: what it was found by, for people.
        parts: its networks by name, the one that streams first.
        tokenizer: a folder, a SentencePiece model, or the byte tensor that holds one.
        scheduler, image_processor: configs as diffusers and transformers write them.
        defaults: the model's own defaults for a request (``defaults.json``), often none.
    """

    origin: str
    parts: Mapping[str, ComponentSource]
    tokenizer: Path | TensorEntry
    scheduler: Mapping[str, Any]
    image_processor: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def streamed(self) -> ComponentSource:
        """The network whose blocks stream while latents are denoised."""
        return next(iter(self.parts.values()))

    @property
    def family(self) -> Family:
        """That the model is of."""
        return self.streamed.family

    def components(self) -> tuple[ComponentSource, ...]:
        """All that there are."""
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
            raise UsageError("no model", expected="--model, or --transformer with the other parts")
        return _assemble(str(files.transformer), _Found(), files)
    path = Path(model).expanduser()
    if path.is_dir():
        return _assemble(str(path), _in_folder(path, files), files)
    if path.exists():
        return _assemble(str(path), _Found(), _with_transformer(path, files))
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _from_hub(model, files, fetch)
    raise CheckpointError(
        f"{model} does not exist",
        expected="a folder, a .safetensors or .gguf file, or a hub id such as "
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        remedy="Check the path.",
    )


@dataclass(frozen=True)
class _Found:
    """Where the parts of a model may be: one place a component, or several to choose from."""

    places: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    tokenizer: Path | None = None
    scheduler: Mapping[str, Any] | None = None
    image_processor: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    pickles: tuple[Path, ...] = ()


def _with_transformer(path: Path, files: Files) -> Files:
    if files.transformer not in (None, path):
        raise UsageError(
            "two transformers", expected="one", found=f"--model {path} and --transformer"
        )
    return Files(path, files.text_encoder, files.vae, files.image_encoder, files.tokenizer)


def _in_folder(folder: Path, files: Files) -> _Found:
    if (folder / "model_index.json").exists():
        log.debug("%s is a folder of diffusers", folder)
        return _diffusers(folder)
    for root in (folder, folder / "models"):
        if any((root / name).is_dir() for name in _COMFY_FOLDERS["transformer"]):
            log.debug("%s is a folder of ComfyUI", root)
            return _comfy(folder, root)
    log.debug("%s is a repository of the model's makers, or any folder", folder)
    return _original(folder)


def _diffusers(folder: Path) -> _Found:
    index = _checked(folder / "model_index.json", fields.MODEL_INDEX) or {}
    check_pipeline(folder, index)
    parts = [name for name in COMPONENTS if (folder / name).is_dir()]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    processor = folder / "image_processor" / "preprocessor_config.json"
    defaults = folder / "defaults.json"
    return _Found(
        places={name: (folder / name,) for name in parts},
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").is_dir() else None,
        scheduler=_checked(scheduler, fields.SCHEDULER),
        image_processor=_checked(processor, fields.IMAGE_PROCESSOR),
        defaults=_checked(defaults, fields.DEFAULTS) or {},
    )


def _checked(path: Path, table: Mapping[str, Field]) -> Mapping[str, Any] | None:
    """The config in ``path``, every value in its range; None if there is none."""
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
    roots = {name: [root / sub for sub in subs] for name, subs in _COMFY_FOLDERS.items()}
    for base in (folder, root.parent):
        extra = base / "extra_model_paths.yaml"
        if extra.exists():
            for name, place in _extra_paths(extra):
                roots[name].append(place)
            break
    places = {
        name: tuple(path for place in dict.fromkeys(subs) for path in _weight_files(place))
        for name, subs in roots.items()
    }
    return _Found(places=places)


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _extra_paths(path: Path) -> Iterator[tuple[str, Path]]:
    """Component and folder of each entry of ComfyUI's ``extra_model_paths.yaml``."""
    import yaml

    try:
        content = yaml.safe_load(_small_text(path)) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read",
            expected="ComfyUI's extra paths in YAML",
            found=" ".join(str(error).split())[:_SHOWN],
        ) from error
    sections = content.values() if isinstance(content, dict) else ()
    for section in sections:
        if not isinstance(section, dict):
            continue
        base = path.parent / Path(_text(section, "base_path")).expanduser()
        for component, names in _COMFY_FOLDERS.items():
            for name in names:
                for line in _text(section, name).splitlines():
                    if line.strip():
                        yield component, base / line.strip()


def _text(section: Mapping[Any, Any], name: str) -> str:
    """An entry that is a text; what else it may be (aliases can unfold without end) is no path."""
    value = section.get(name)
    return value if isinstance(value, str) else ""


def _small_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_YAML_BYTES:
        raise ValueError(f"{size:,} bytes, and {_MAX_YAML_BYTES:,} are the most")
    return read_regular(path).decode("utf-8")


def _original(folder: Path) -> _Found:
    """Wan's own repository: a sharded transformer at the top, the rest beside it."""
    places: dict[str, tuple[Path, ...]] = {}
    index = sorted(folder.glob("*.safetensors.index.json"))
    loose = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _SUFFIXES]
    if index:
        loose = [path for path in loose if not re.search(r"-\d{5}-of-\d{5}\.", path.name)]
        places["transformer"] = (index[0],)
    for name in COMPONENTS:
        places[name] = (*places.get(name, ()), *loose)
    pickles = tuple(p for p in sorted(folder.iterdir()) if p.suffix in PICKLES)
    if not (index or loose or pickles):
        raise CheckpointError(
            f"{folder} is no model folder",
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
    first = _component(COMPONENTS[0], found, files)
    names = first.family.needed(first.config)
    parts = {COMPONENTS[0]: first} | {name: _component(name, found, files) for name in names}
    return ModelSource(
        origin=origin,
        parts=parts,
        tokenizer=_tokenizer(parts["text_encoder"], found, files),
        scheduler=dict(found.scheduler or first.family.SCHEDULER),
        image_processor=_sized(found.image_processor or first.family.IMAGE_PROCESSOR),
        defaults=found.defaults,
    )


def _sized(processor: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(v) if isinstance(v, Mapping) else v for key, v in processor.items()}


def _component(name: str, found: _Found, files: Files) -> ComponentSource:
    given = getattr(files, name)
    if given is not None:
        return _given(name, given, found)
    places = found.places.get(name, ())
    if len(places) == 1 and places[0].is_dir():
        source = open_component(places[0])
        _check_kind(name, source)
        return source
    return _choose(name, places, found)


def _given(name: str, given: Path, found: _Found) -> ComponentSource:
    given = given.expanduser()
    if not given.exists():
        named = [path for path in found.places.get(name, ()) if path.name == str(given)]
        given = named[0] if named else given
    source = open_component(given)
    _check_kind(name, source)
    return source


def _check_kind(name: str, source: ComponentSource) -> None:
    if source.component != name:
        raise CheckpointError(
            f"{source.raw.path} is no {name.replace('_', ' ')}",
            expected=f"the {name.replace('_', ' ')} of a Wan2.1 model",
            found=f"a {source.kind.label} ({source.title})",
            remedy=f"Give it with {_FLAGS[source.component]}.",
        )
    source.check()


def _choose(name: str, places: tuple[Path, ...], found: _Found) -> ComponentSource:
    """The one file among ``places`` that is this component; others may be anything."""
    fitting: list[ComponentSource] = []
    refused: list[PenstockError] = []
    for path in places:
        try:
            source = open_component(path)
            if source.component == name:
                source.check()
                fitting.append(source)
        except CheckpointError as error:
            log.debug("%s is not it: %s", path, error)
            refused.append(error)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"more than one {name.replace('_', ' ')}",
            expected=f"one; name it with {_FLAGS[name]}",
            found=", ".join(source.raw.path.name for source in fitting),
        )
    raise _nothing(name, found, refused)


def _nothing(name: str, found: _Found, refused: list[PenstockError]) -> PenstockError:
    if found.pickles:
        return refusal_of(_likely_pickle(name, found.pickles))
    if len(refused) == 1:
        return refused[0]
    return CheckpointError(
        f"the model has no {name.replace('_', ' ')}",
        expected=f"a file given with {_FLAGS[name]}, or a folder that holds one",
        found="none" if not refused else f"{len(refused)} files of other models",
        remedy="Comfy-Org's repackaged Wan 2.1 files have all parts.",
    )


def _likely_pickle(name: str, pickles: tuple[Path, ...]) -> Path:
    marks = {"text_encoder": "t5", "vae": "vae", "image_encoder": "clip"}
    mark = marks.get(name, "")
    return next((path for path in pickles if mark in path.name.lower()), pickles[0])


def open_component(path: Path) -> ComponentSource:
    """Recognise the component in ``path`` (a file, an index, or a folder with a config.json); mmgp
    writes the config into the file's header.

    Raises:
        CheckpointError: as `recognise` and `open_raw` do.
    """
    raw = open_raw(path)
    with looked_at(path):
        folder = path if path.is_dir() else path.parent
        config = _config_beside(folder)
        found = recognise(raw, _config_within(raw) if config is None else config)
    if log.isEnabledFor(logging.DEBUG):
        told = (found.component, found.title, found.label())
        log.debug("%s (%s) is the %s of %s, stored as %s", path, raw.kind, *told)
    return found


def _config_beside(folder: Path) -> dict[str, Any] | None:
    """The config.json of diffusers or transformers; Wan's own one tells less than the shapes."""
    path = folder / "config.json"
    if not path.exists():
        return None
    return _ours(read_object(path))


def _config_within(raw: RawFile) -> dict[str, Any] | None:
    """The config that the header carries in base64, as mmgp saves it."""
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
    return _ours(parse_object(content, where))


def _ours(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``config`` without what is not the network's own; None if it is of no class that is run."""
    kinds = [kind for family in families() for kind in family.KINDS.values()]
    named = config.get("_class_name") in [kind.made_by[1] for kind in kinds]
    typed = config.get("model_type") in [kind.model_type for kind in kinds if kind.model_type]
    if not (named or typed):
        return None
    foreign = "quantization_config"  # the tensors tell how they are stored
    return {k: v for k, v in config.items() if not k.startswith("_") and k != foreign}


def _tokenizer(text: ComponentSource, found: _Found, files: Files) -> Path | TensorEntry:
    if files.tokenizer is not None:
        if not files.tokenizer.exists():
            raise CheckpointError(f"{files.tokenizer} does not exist", expected="a tokenizer")
        if not files.tokenizer.is_dir():
            open_regular(files.tokenizer).close()
        return files.tokenizer
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
    try:
        folder = fetch(model, True)
        return _assemble(model, _in_folder(folder, files), files)
    except (FileNotFoundError, CheckpointError):
        pass  # not there, or a download that did not finish: get what is missing
    try:
        folder = fetch(model, False)
    except (ConnectionError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{model} is not in the local cache and cannot be downloaded",
            expected="a whole snapshot, or a way to the hub",
            found=str(error).strip().partition("\n")[0] or type(error).__name__,
            remedy="Go online, or give a folder or files that you have.",
        ) from error
    return _assemble(model, _in_folder(folder, files), files)
