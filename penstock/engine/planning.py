"""From what was asked on the command line to a plan, without opening a weight and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.attention.choice import attending_on
from penstock.engine.family.protocol import builtin
from penstock.engine.files.locate import Files
from penstock.engine.request.generation import (
    DISTILLED,
    GenerationRequest,
    parse_area,
    parse_size,
    size_for,
    workload_of,
)
from penstock.errors import UsageError
from penstock.profiles.advice import plan_chosen
from penstock.profiles.cards import described
from penstock.profiles.hardware import Hardware, default_device, probe
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan
from penstock.profiles.profile import AUTO, Chosen, Overrides, choose, load


@dataclass(frozen=True)
class Asked:
    """The request of a plan; None: the official default."""

    size: str | None = None
    max_area: str | None = None
    frames: int | None = None
    steps: int | None = None
    cfg: float | None = None
    image: Path | None = None
    distilled: bool = False

    @property
    def workload(self) -> Workload:
        """As the planner takes it: `penstock generate` keeps its jobs.

        Raises:
            RequestError: an illegal value; UsageError: both a size and an area.
        """
        if self.size is not None and self.max_area is not None:
            raise UsageError(
                "two answers to one question", expected="--size or --max-area", found="both"
            )
        width, height = 1280, 720
        if self.size is not None:
            width, height = parse_size(self.size)
        elif self.max_area is not None:
            width, height = size_for((width, height), parse_area(self.max_area))
        given: dict[str, Any] = {
            "frames": self.frames,
            "steps": self.steps,
            "guidance_scale": self.cfg,
        }
        request = GenerationRequest(
            prompt="a plan",
            image=Path("a plan"),
            width=width,
            height=height,
            **(dict(DISTILLED) if self.distilled else {})
            | {name: value for name, value in given.items() if value is not None},
        )
        return workload_of(request, kept=True)


@dataclass(frozen=True)
class Target:
    """The machine to plan for, and what flags say about it.

    Attributes:
        device: of this machine: "auto", "cuda" or "cpu".
        card: a known card; ``ram`` and ``disk`` then describe the rest of its machine.
        ram: a ceiling, or with ``card`` the system memory of its machine.
    """

    device: str = "auto"
    card: str | None = None
    ram: str | None = None
    disk: str | None = None
    vram: str | None = None
    profile: str = AUTO
    format: str | None = None
    compute: str | None = None
    attention: str | None = None

    @property
    def hardware(self) -> Hardware:
        """The machine.

        Raises:
            UsageError: a disk without a card, or something unknown.
        """
        if self.card is not None:
            return described(self.card, self.ram, self.disk)
        if self.disk is not None:
            raise UsageError(
                "--disk describes a machine that is not there",
                expected="--card as well",
                remedy="penstock doctor measures this machine's own disk.",
            )
        return probe(self.device if self.device in ("cpu", "cuda") else default_device())

    @property
    def overrides(self) -> Overrides:
        """What wins over the profile."""
        ram = self.ram if self.card is None else None
        return Overrides(
            self.vram, ram, format=self.format, compute=self.compute, attention=self.attention
        )


def make_plan(
    model: str | None,
    files: Files,
    synthetic: str | None,
    asked: Asked,
    target: Target,
    loras: Sequence[str] = (),
) -> Plan:
    """The plan for a model, or for a built-in description.

    Args:
        model, files: as `penstock.engine.files.locate.locate` takes them.

    Raises:
        UsageError: neither or both, or LoRAs without a model; OverBudget: nothing fits.
    """
    hardware = target.hardware
    chosen = choose(load(target.profile), target.overrides, hardware)
    has_files = model is not None or files != Files()
    if synthetic is not None and loras:
        raise UsageError(
            "a LoRA is checked against a model's files", expected="--model", found="--synthetic"
        )
    if synthetic is not None and not has_files:
        if target.card is None:
            chosen, _ = attending_on(chosen, builtin(synthetic, chosen.formats[0]).heads)
        return plan_chosen(lambda stored: builtin(synthetic, stored), asked.workload, chosen)
    if synthetic is None and has_files:
        opened = _Opened(model, files, tuple(loras), described=target.card is not None)
        return plan_files(opened, asked, chosen)
    raise UsageError(
        "a plan needs a model",
        expected="--model MODEL or --synthetic NAME",
        found="both" if has_files else "neither",
    )


@dataclass(frozen=True)
class _Opened:
    """A model's files and LoRAs, and whether the machine is only described."""

    model: str | None
    files: Files
    loras: tuple[str, ...]
    described: bool


def plan_files(opened: _Opened, asked: Asked, chosen: Chosen) -> Plan:
    """The plan for a model's files; reads their headers.

    Raises:
        CheckpointError: they are not a model that penstock runs.
    """
    from penstock.engine.lora.file import as_loras
    from penstock.engine.model.files import ModelFiles
    from penstock.engine.request.settings import Settings, resolve
    from penstock.engine.variants import Variants, computing_on
    from penstock.quant.paths import Computing, Scratch

    settings = Settings(
        prompt="a plan",
        size=asked.size,
        max_area=asked.max_area,
        frames=asked.frames,
        steps=asked.steps,
        guidance_scale=asked.cfg,
        image=asked.image,
        distilled=asked.distilled,
    )
    model = ModelFiles.open(opened.model, opened.files, as_loras(opened.loras))
    request = resolve(settings, model)
    device = chosen.hardware.place
    computing = Computing(Scratch(0, device))
    if not opened.described:
        computing, _ = computing_on(device, chosen.policy.compute)
        heads, tag = model.manifest.heads, model.streamed.tag
        chosen, _ = attending_on(chosen, heads, tag)
    variants = Variants(model, chosen, computing, described=opened.described)
    found = variants.plan(workload_of(request, kept=True))
    return replace(found, origins=found.origins + model.loras.origins())
