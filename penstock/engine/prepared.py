"""The one door to a plan: a model and the options it runs under, on this machine or on another.

The model is a folder's or files' headers, or a built-in description without any file. What a job
takes is known here, and nothing of it is loaded. torch is imported only where the device must be
asked: it may be a GPU, or shall compute in 8 bits. So a plan is given, and a request refused, at
once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from penstock.engine.attention.choice import attending_on
from penstock.engine.family.protocol import builtin
from penstock.engine.files.locate import Files
from penstock.engine.lora.file import Lora, as_loras
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.grid import Grid
from penstock.engine.model.official import Official
from penstock.engine.model.opening import Opening
from penstock.engine.request.generation import (
    GenerationRequest,
    check_pictures,
    check_two,
    workload_of,
)
from penstock.engine.request.settings import Suited
from penstock.engine.variants import Variants, computing_on
from penstock.errors import UsageError
from penstock.profiles.advice import plan_chosen
from penstock.profiles.cards import described
from penstock.profiles.hardware import Hardware, default_device, probe
from penstock.profiles.options import Options
from penstock.profiles.phases import Manifest, Workload
from penstock.profiles.plan import Plan
from penstock.profiles.policy import AUTO
from penstock.profiles.profile import Chosen, choose, load
from penstock.quant.paths import Computing, Scratch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltIn:
    """A built-in description in the place of a model's files: it is planned, and never run.

    Attributes:
        name: as `penstock.engine.family.protocol.builtin` has it.
        chosen: budgets, policy and formats.
    """

    name: str
    chosen: Chosen

    @property
    def grid(self) -> Grid:
        """The sizes that the model can represent."""
        return self.official.grid

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Of requests: none, so that the official ones count."""
        return {}

    @property
    def official(self) -> Official:
        """Of requests, as the model was released with."""
        return cast("Official", self.manifest(self.chosen.formats[0]))

    @property
    def origin(self) -> str:
        """For messages."""
        return f"the built-in {self.name}"

    def manifest(self, weight_format: str) -> Manifest:
        """Return the model with its block matrices in that format.

        Raises:
            ProfileError: no such model, or no such format.
        """
        return builtin(self.name, weight_format)

    def plan(self, workload: Workload) -> Plan:
        """Return the plan in the first format that fits.

        Raises:
            OverBudget: no plan fits the budgets.
        """
        return plan_chosen(self.manifest, workload, self.chosen)


class Remade(TypedDict):
    """What a `Prepared` keeps to be opened again."""

    asked: Options
    make: Callable[[Options], Prepared]


class Prepared:
    """A model, and the budgets and policy it is planned under. Made by :meth:`open`.

    Args:
        plans: the model in the formats it may run in, or a description of one.
        chosen: budgets, policy, formats and options.
        notices: what is to be said of the device's 8-bit products and attention, and of the files.
        asked: the options that it was opened under.
        make: opens the same under other options.

    Attributes:
        chosen, notices, asked: as given.
        about: what `penstock.engine.request.settings.resolve` needs to know of the model.
    """

    def __init__(
        self,
        plans: Variants | BuiltIn,
        chosen: Chosen,
        notices: tuple[str, ...] = (),
        *,
        asked: Options,
        make: Callable[[Options], Prepared],
    ) -> None:
        self._plans, self.chosen, self.notices = plans, chosen, notices
        self.asked, self._make = asked, make
        self.about: Suited = plans.stored if isinstance(plans, Variants) else plans

    @classmethod
    def open(
        cls,
        model: str | Path | None = None,
        *,
        files: Files | None = None,
        loras: Sequence[Lora | str | Path] = (),
        options: Options | None = None,
        synthetic: str | None = None,
        machine: Hardware | None = None,
        cache: Path | None = None,
        **named: str | int | None,
    ) -> Prepared:
        """Open a model; reads headers only.

        Args:
            model, files, loras, options, named: as `penstock.engine.engine.Engine.open`.
            synthetic: the name of a built-in description, in the place of a model.
            machine: another one than this, as `machine_of` describes it: nothing of it is tried.
            cache: where packs are kept; None: `penstock.folders.cache_folder`.

        Raises:
            As `penstock.engine.engine.Engine.open`; UsageError: neither a model nor a description,
            or both.
        """
        options, files = (options or Options()).named(named), files or Files()
        has_files = model is not None or files != Files()
        if has_files == (synthetic is not None):
            raise UsageError(
                "a plan needs a model",
                expected="--model MODEL or, to plan only, --synthetic NAME",
                found="both" if has_files else "neither",
            )
        if synthetic is None:
            name = None if model is None else str(model)
            opening = Opening(name, files, as_loras(loras), options)
            return cls.reopen(opening, machine=machine, cache=cache)
        if loras:
            raise UsageError(
                "a LoRA can only be checked against a model's files",
                expected="--model",
                found="--synthetic",
            )
        return cls._of_description(synthetic, options, machine)

    @classmethod
    def reopen(
        cls, opening: Opening, *, machine: Hardware | None = None, cache: Path | None = None
    ) -> Prepared:
        """Open a model's files as ``opening`` says.

        Args:
            opening: the model, its parts, its LoRAs and the options.
            machine, cache: as for :meth:`open`.

        Raises:
            As `penstock.engine.engine.Engine.open`.
        """
        asked: Remade = {
            "asked": opening.options,
            "make": lambda options: cls.reopen(
                replace(opening, options=options), machine=machine, cache=cache
            ),
        }
        chosen = _chosen(opening.options, machine)
        model = ModelFiles.open(opening.model, opening.files, opening.loras)
        model = replace(model, opening=replace(opening, options=chosen.options))
        if machine is not None:
            computing = Computing(Scratch(0, chosen.hardware.place))
            return cls(Variants(model, chosen, computing, cache, described=True), chosen, **asked)
        computing, products = computing_on(chosen.hardware.place, chosen.policy.compute)
        heads, tag = model.manifest.heads, model.streamed.tag
        chosen, attention = attending_on(chosen, heads, tag)
        notices = (*products, *attention, *model.notices)
        log.debug("on this device: %s", notices)
        return cls(Variants(model, chosen, computing, cache), chosen, notices, **asked)

    @classmethod
    def _of_description(cls, name: str, options: Options, machine: Hardware | None) -> Prepared:
        chosen = _chosen(options, machine)
        notices: tuple[str, ...] = ()
        if machine is None:
            heads = builtin(name, chosen.formats[0]).heads
            chosen, notices = attending_on(chosen, heads)
        return cls(
            BuiltIn(name, chosen), chosen, notices, asked=options,
            make=lambda other: cls._of_description(name, other, machine),
        )  # fmt: skip

    def again(self, options: Options) -> Prepared:
        """Return the same model under other options, on the same machine.

        Raises:
            As `penstock.engine.engine.Engine.open`.
        """
        return self._make(options)

    def close(self) -> None:
        """Close the files."""
        if isinstance(self._plans, Variants):
            self._plans.close()

    @property
    def variants(self) -> Variants:
        """The model in the formats it may run in.

        Raises:
            UsageError: it is a description only.
        """
        if isinstance(self._plans, BuiltIn):
            raise UsageError(
                f"{self._plans.origin} has no weights", expected="a model's files to run"
            )
        return self._plans

    @property
    def model(self) -> ModelFiles:
        """The model as its files hold it.

        Raises:
            UsageError: it is a description only.
        """
        return self.variants.stored

    @property
    def hardware(self) -> Hardware:
        """What is planned for: the device, its budgets and its rates."""
        return self.chosen.hardware

    def plan(self, asked: GenerationRequest | Workload, *, saved: bool = False) -> Plan:
        """Return what a job takes: of a request, which must suit the model's files, or of a shape,
        whatever it shows.

        Args:
            asked: the request or the shape.
            saved: for a request: the job is saved in a folder while it runs (a `Workload` says so).

        Raises:
            OverBudget: no plan fits the budgets; names a profile or a request that does.
            RequestError: the request does not suit the model.
        """
        if isinstance(asked, GenerationRequest):
            if isinstance(self._plans, Variants):
                check_pictures(asked, self.model.manifest.pictures)
                check_two(asked, len(self.model.streaming))
            asked = workload_of(asked, saved=saved)
        return self._plans.plan(asked)


def machine_of(
    options: Options, card: str | None, disk: str | None
) -> tuple[Options, Hardware | None]:
    """Return the machine that a plan is for: None is this one; and the options that are left for
    it.

    Args:
        options: their ``ram`` is with ``card`` the memory of its machine, and then no ceiling.
        card: a known card, or None.
        disk: of that machine; only with a card.

    Raises:
        UsageError: a disk without a card; ProfileError: a card or a disk that is unknown.
    """
    if card is not None:
        ram = None if options.ram is None else str(options.ram)
        return replace(options, ram=None), described(card, ram, disk)
    if disk is not None:
        raise UsageError(
            "--disk describes another machine's disk",
            expected="--card as well",
            remedy="penstock doctor measures this machine's own disk.",
        )
    return options, None


def _chosen(options: Options, machine: Hardware | None) -> Chosen:
    hardware = machine or probe(_device_type(options.device or AUTO))
    log.debug("asked for %s on %s", options, hardware)
    chosen = choose(load(options.profile or AUTO), options, hardware)
    for origin in chosen.origins:
        log.debug("%s is %s: %s", origin.name, origin.value, origin.source)
    return chosen


def _device_type(name: str) -> str:
    if name == AUTO:
        return default_device()
    if name == "cuda":
        _check_cuda()
    return name


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device",
            expected="a CUDA build of torch and a working driver",
            found=f"torch {torch.__version__}",
            remedy="Install a CUDA build of torch, or pass --device cpu.",
        )
