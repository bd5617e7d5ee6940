"""What a family of models tells the rest of the engine, and the families there are.

A family is one folder in `penstock.engine.families`. Its module ``family`` is a `Family`: constants
and functions under the names below. Nothing else of the folder is imported from outside it, and
nothing but `families` knows a family by name.

What a family says costs nothing to import: a file is recognised, a model opened, a job planned and
refused by headers alone, without torch. What computes (`Family.build` and the like) is imported
when it is first called. What needs the types of a higher room is stated there:
`penstock.engine.model.files.ModelFamily`, `penstock.engine.run.pipeline.WorkFamily`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from penstock.engine.family.naming import Naming, ShapesOf
from penstock.errors import ProfileError
from penstock.offload.checkpoint import TensorEntry
from penstock.profiles.phases import Manifest

Config = Mapping[str, Any]

_MODULES = (
    "penstock.engine.families.wan.family",
    "penstock.engine.families.minimax_h3.family",
)
"""The registry: every family there is, in the order in which files are tried."""


@dataclass(frozen=True)
class ComponentKind:
    """One network of a family, as files hold it.

    Attributes:
        name: in plans, in folders of diffusers and in flags: "transformer", "vae", ...
        made_by: library and class that write it.
        variants: other classes whose config.json tells of the same network.
        model_type: that its config.json states, where transformers writes it.
        namings: whose names its tensors may bear.
        derive: its config from the shapes of its tensors, for files without a config.json.
        shapes: every tensor that a config demands.
        title: the model's name for people, by its config.
        defaults: of its class, for what a config.json leaves out.
        blocks: what begins the names of its blocks' tensors, up to the number; "" without blocks.
        count: blocks that run, by its config.
        leaves_stream: whether a block's tensor is not streamed with it, by its local name.
        run_outside: the run of a pack in which a tensor outside the blocks lies, by its name.
        is_packed: its block matrices may be packed in another format.
        keeps_single: whether a parameter is in fp32 whatever the network computes in, by its name.
        check: refuses a config that is like this network's and is not run.
    """

    name: str
    made_by: tuple[str, str]
    namings: tuple[Naming, ...]
    derive: Callable[[ShapesOf], dict[str, Any]]
    shapes: Callable[[Config], dict[str, tuple[int, ...]]]
    title: Callable[[Config], str]
    defaults: Config
    model_type: str | None = None
    variants: tuple[str, ...] = ()
    blocks: str = ""
    count: Callable[[Config], int] = lambda config: 0
    leaves_stream: Callable[[str], bool] = lambda name: False
    run_outside: Callable[[str], str] = lambda name: "rest"
    is_packed: bool = False
    keeps_single: Callable[[str], bool] = lambda name: False
    check: Callable[[str, Config], None] = lambda where, config: None

    @cached_property
    def label(self) -> str:
        """For people: "text encoder"."""
        return self.name.replace("_", " ")


class Family(Protocol):
    """What a family's module ``family`` offers to the rooms of files and models."""

    NAME: str
    """In records and logs."""

    KINDS: Mapping[str, ComponentKind]
    """Its networks by name, first the one that streams while latents are denoised."""

    SCHEDULER: Config
    """The noise schedule where a model comes without its config."""

    IMAGE_PROCESSOR: Config
    """How pictures are prepared where a model comes without its config."""

    def check_pipeline(self, folder: Path, index: Config) -> None:
        """Refuse a ``model_index.json`` of another pipeline.

        Raises:
            CheckpointError: not of this family.
        """

    def stranger(self, entries: Mapping[str, TensorEntry]) -> str | None:
        """Return the model akin to this family whose tensors these are, by their names in the file,
        if it is not run."""

    def check_together(self, origin: str, configs: Mapping[str, Config]) -> None:
        """Refuse networks that do not belong together.

        Args:
            origin: where the model is, for people.
            configs: of each network by name, gaps filled.

        Raises:
            CheckpointError: names the two, and the sizes that differ.
        """

    def needed(self, config: Config) -> Iterator[str]:
        """Return the names of the networks that a model needs whose streamed one has this
        config."""

    def pipeline(self, configs: Mapping[str, Config]) -> str:
        """Return the class that ``model_index.json`` names for a model of networks with these
        configs."""

    def adapted_title(self, width: int | None, blocks: int, pictured: bool) -> str:
        """Return the name of the model that a LoRA was made for, as far as its tensors tell.

        Args:
            width: of the hidden states.
            blocks: one more than the last that it changes; 0: it changes none.
            pictured: it changes what only a picture's model has.
        """

    def build(self, component: str, config: Config) -> tuple[Any, Any]:
        """Build the network on the meta device with one block, and that block (None: it has
        none)."""

    def builtins(self) -> Mapping[str, Callable[[str], Manifest]]:
        """Return the descriptions without files: manifests in a weight format, by the model's
        name."""


def families() -> tuple[Family, ...]:
    """Return all families, in the order in which files are tried."""
    return tuple(cast("Family", import_module(name)) for name in _MODULES)


def builtin_names() -> tuple[str, ...]:
    """Return the names of the models that are described without files."""
    return tuple(_builtins())


def builtin(name: str, weight_format: str) -> Manifest:
    """Return the description called ``name``, its blocks' matrices in ``weight_format``.

    Raises:
        ProfileError: no such model, or no such format.
    """
    found = _builtins()
    if name not in found:
        raise ProfileError(
            "no built-in description of this model",
            expected="one of " + ", ".join(found),
            found=repr(name),
            remedy="Give --model and its folder instead.",
        )
    return found[name](weight_format)


def _builtins() -> dict[str, Callable[[str], Manifest]]:
    return {name: make for family in families() for name, make in family.builtins().items()}
