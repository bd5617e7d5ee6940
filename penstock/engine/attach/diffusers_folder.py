"""Any folder of diffusers opened as a pipeline whose networks have no weights: these stay in their
files until they are used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from penstock.engine.attach.filenames import tie
from penstock.engine.attach.fileweights import FileWeights, kept_in_fp32
from penstock.engine.attach.routing import index_of
from penstock.engine.attach.unmasked import leave_out_padding
from penstock.errors import CheckpointError


@dataclass(frozen=True)
class Opened:
    """A pipeline, where the weights of its networks lie, by their names there, and what its user
    is to be told."""

    pipe: Any
    files: Mapping[str, FileWeights]
    notices: tuple[str, ...]


def pipeline_class(folder: Path) -> Any:
    """Return the class of the pipeline in ``folder``.

    Raises:
        CheckpointError: diffusers has none of that name.
    """
    index = index_of(folder) or {}
    name = index.get("_class_name")
    diffusers = import_module("diffusers")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline)
    if not inspect.isclass(found) or not issubclass(found, bases):
        raise CheckpointError(
            f"{folder} holds a pipeline that the installed diffusers does not have",
            expected=f"a pipeline of diffusers {diffusers.__version__}",
            found=repr(name),
            remedy="Update diffusers. Code that comes with a model is not run.",
        )
    return found


def open_folder(folder: Path, stack: ExitStack, *, exact: bool = False) -> Opened:
    """Open the pipeline of ``folder``: schedulers, tokenizers and the like loaded, networks without
    weights.

    Args:
        stack: closes the files.
        exact: keep every module's arithmetic to the bit; see `penstock.attach`.

    Raises:
        CheckpointError: parts are missing, or are not what this diffusers knows.
    """
    made = pipeline_class(folder)
    modules = {
        name: _network(folder / name, *place)
        for name, place in _components(folder).items()
        if _is_network(*place)
    }
    files = {
        name: FileWeights(module, folder / name, stack, kept_in_fp32(module, folder / name))
        for name, module in modules.items()
    }
    for each in files.values():
        each.fill_buffers(stack)
    with _quietly():
        pipe = made.from_pretrained(folder, local_files_only=True, **_given(made, modules))
        if issubclass(made, import_module("diffusers").ModularPipeline):
            others = [name for name in _components(folder) if name not in modules]
            pipe.load_components(names=others, local_files_only=True)
            pipe.update_components(**modules)
    told = [] if exact else [leave_out_padding(each, stack) for each in modules.values()]
    return Opened(pipe, files, tuple(each for each in told if each is not None))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without diffusers' warnings of components that it has not loaded itself, printed whole."""
    logging = import_module("diffusers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _given(made: Any, modules: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Return what ``from_pretrained`` takes instead of loading it; modular pipelines load
    nothing."""
    modular = import_module("diffusers").ModularPipeline
    return {} if issubclass(made, modular) else modules


def _components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the library and class of each component that there is."""
    index = index_of(folder) or {}
    found: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) >= 2:
            library, class_name = value[0], value[1]
            if isinstance(library, str) and isinstance(class_name, str):
                found[name] = (library, class_name)
    return found


def _class(library: str, name: str) -> Any:
    """Return a class of diffusers or transformers; None: it is neither's."""
    if library == "transformers":
        return getattr(import_module("transformers"), name, None)
    diffusers = import_module("diffusers")
    if library != "diffusers":
        # A name without a library is one of the pipeline's own package.
        package = getattr(diffusers.pipelines, library, None)
        return getattr(package, name, None)
    return getattr(diffusers, name, None)


def _is_network(library: str, name: str) -> bool:
    found = _class(library, name)
    return inspect.isclass(found) and issubclass(found, nn.Module)


def _network(folder: Path, library: str, name: str) -> nn.Module:
    """Make the network without weights, as its config says."""
    from penstock.engine.model.binding import skeleton

    found = _class(library, name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no {name}",
            expected="config.json and the weights beside it",
            remedy="Finish the download.",
        )
    if library == "transformers":
        config = found.config_class.from_pretrained(folder, local_files_only=True)
    else:
        config = found.load_config(folder, local_files_only=True)
    made: nn.Module = skeleton(found, config)
    tie(made)
    return made
